"""Damages with a name: what a hand, a mix-up or a half-finished act does to a folder."""

import dataclasses
import json
import os
import pathlib
import shutil
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import specimens
import tensorstore
from safetensors import numpy as safetensors

from calm_jax.data import store as store_lib
from calm_jax.interchange import tensors

Strike = Callable[[specimens.Place], None]


@dataclasses.dataclass(frozen=True)
class Target:
  """A damage to a specimen and the acts that meet it.

  Attributes:
    must_tell: whether it must be told even where the result stays the same.
    taken: whether what now stands there may be taken as it is; see damage.py.
  """

  strike: Strike
  specimen: str
  acts: tuple[str, ...]
  must_tell: bool
  taken: bool


TARGETS: dict[str, Target] = {}


def target(specimen: str, *acts: str, must_tell: bool = False, taken: bool = False):
  """Enters a function into TARGETS, or the same function for several specimens."""

  def enter(strike: Strike) -> Strike:
    name = strike.__name__.strip("_")
    name = name if name not in TARGETS else f"{name}_of_{specimen}"
    TARGETS[name] = Target(strike, specimen, acts, must_tell, taken)
    return strike

  return enter


def edit(path: pathlib.Path, **changes: Any) -> None:
  """Changes values of a JSON file; names have __ for dots."""
  values = json.loads(path.read_text())
  for name, new in changes.items():
    *outer, last = name.split("__")
    inside = values
    for key in outer:
      inside = inside[key]
    inside[last] = new(inside[last]) if callable(new) else new
  path.write_text(json.dumps(values))


def replace(path: pathlib.Path, other: pathlib.Path) -> None:
  """Puts a copy of a file or folder in the place of another."""
  if path.is_dir():
    shutil.rmtree(path)
    shutil.copytree(other, path)
  else:
    shutil.copyfile(other, path)


def fifo(path: pathlib.Path) -> None:
  path.unlink()
  os.mkfifo(path)


def nested(path: pathlib.Path) -> None:
  path.write_text("[" * 100_000)


def lines_of(path: pathlib.Path) -> list[bytes]:
  return path.read_bytes().splitlines(keepends=True)


def array(place: specimens.Place, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
  """Writes an array of a store anew, with good sums of its own."""
  path = f"{place.case}/{name}/"
  opened = tensorstore.open(
    {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}, open=True
  ).result()
  opened.write(change(np.asarray(opened.read().result()))).result()


# A store.


@target("store", "read")
def manifest_bytes(place):
  """The manifest counts one byte of text more."""
  path = place.case / store_lib.MANIFEST
  values = json.loads(path.read_text())
  values["sources"][0]["bytes"] += 1
  path.write_text(json.dumps(values))


@target("store", "read", "train")
def manifest_eos(place):
  """The manifest names another token for EOS."""
  edit(place.case / store_lib.MANIFEST, tokenizer__eos_id=7)


@target("store", "read")
def manifest_appends_eos(place):
  """The manifest says that no EOS ends a document."""
  edit(place.case / store_lib.MANIFEST, appends_eos=False)


@target("store", "read")
def manifest_checksum(place):
  """The manifest has another sum of the training tokens."""
  edit(place.case / store_lib.MANIFEST, splits__train__checksum="0" * 16)


@target("store", "read", "prepare")
def manifest_empty_object(place):
  """The manifest is {}."""
  (place.case / store_lib.MANIFEST).write_text("{}")


@target("store", "read", "prepare")
def manifest_list(place):
  """The manifest is a list."""
  (place.case / store_lib.MANIFEST).write_text("[1]")


@target("store", "read", "prepare")
def manifest_nested(place):
  """The manifest is nested 100,000 deep."""
  nested(place.case / store_lib.MANIFEST)


@target("store", "read")
def manifest_fifo(place):
  """The manifest is a pipe."""
  fifo(place.case / store_lib.MANIFEST)


@target("store", "prepare")
def plan_list(place):
  """The plan is a list."""
  (place.case / "plan.json").write_text("[1]")


@target("store", "prepare")
def plan_nested(place):
  """The plan is nested 100,000 deep."""
  nested(place.case / "plan.json")


@target("store", "prepare")
def plan_fifo(place):
  """The plan is a pipe."""
  fifo(place.case / "plan.json")


@target("store", "train")
def store_tokenizer_swapped(place):
  """The tokenizer of another store of the same size lies in the store."""
  replace(place.case / "tokenizer.model", place.root / "other_store/tokenizer.model")


@target("store", "verify")
def store_tokens_zeroed(place):
  """Training tokens are zero, with good sums of their chunks."""
  array(place, "train/tokens", lambda x: np.where(np.arange(len(x)) < 500, 0, x).astype(x.dtype))


@target("store", "verify")
def store_offsets_changed(place):
  """Documents begin one token later, with good sums of their chunks."""
  array(place, "train/offsets", lambda x: np.concatenate([x[:1], x[1:-1] + 1, x[-1:]]))


@target("store", "verify")
def store_heldout_tokens_changed(place):
  """Held-out tokens are in another order, with good sums of their chunks."""
  array(place, "heldout/tokens", lambda x: x[::-1])


@target("store", "prepare")
@target("parts", "prepare")
@target("autoencoder", "resume")
def rubbish_lease(place):
  """A lease holds rubbish."""
  (place.case / ".lease").write_bytes(b"\xff{nothing")


# Parts of a store.


def _part(place: specimens.Place, ending: str) -> pathlib.Path:
  (found,) = place.case.glob(f"unfinished/*/00000.{ending}")
  return found


@target("parts", "prepare")
def part_counts_empty_object(place):
  """The counts of a part are {}."""
  _part(place, "json").write_text("{}")


@target("parts", "prepare")
def part_counts_list(place):
  """The counts of a part are a list."""
  _part(place, "json").write_text("[1, 2]")


@target("parts", "prepare")
def part_counts_text(place):
  """A count of a part is text."""
  edit(_part(place, "json"), **{"train.tokens": "many"})


@target("parts", "prepare")
def part_counts_changed(place):
  """A part counts two tokens fewer than it has."""
  edit(_part(place, "json"), **{"train.tokens": lambda count: count - 2})


@target("parts", "prepare")
def part_counts_nested(place):
  """The counts of a part are nested 100,000 deep."""
  nested(_part(place, "json"))


@target("parts", "prepare")
def part_tokens_zeroed(place):
  """The tokens of a part are zeros."""
  path = _part(place, "train.tokens")
  path.write_bytes(bytes(path.stat().st_size))


@target("parts", "prepare")
def part_tokens_cut(place):
  """Some tokens at the end of a part are gone."""
  path = _part(place, "train.tokens")
  path.write_bytes(path.read_bytes()[:-40])


@target("parts", "prepare")
def part_tokens_odd(place):
  """The last byte of a part's tokens is gone."""
  path = _part(place, "train.tokens")
  path.write_bytes(path.read_bytes()[:-1])


@target("parts", "prepare")
def part_lengths_zeroed(place):
  """The lengths of a part's documents are zeros."""
  path = _part(place, "train.lengths")
  path.write_bytes(bytes(path.stat().st_size))


@target("parts", "prepare")
def part_file_gone(place):
  """The held-out tokens of a part are gone."""
  _part(place, "heldout.tokens").unlink()


@target("parts", "prepare")
def part_tokenizer_swapped(place):
  """The tokenizer that the parts were made with is another."""
  (path,) = place.case.glob("unfinished/*/tokenizer.model")
  replace(path, place.root / "other_store/tokenizer.model")


@target("parts", "prepare")
def part_tokenizer_empty(place):
  """The tokenizer that the parts were made with is empty."""
  (path,) = place.case.glob("unfinished/*/tokenizer.model")
  path.write_bytes(b"")


# A workdir: what belongs together is swapped or edited.


@target("calm", "export", "evaluate", "resume")
def autoencoder_swapped(place):
  """The frozen autoencoder is another of the same sizes."""
  replace(place.case / "autoencoder", place.root / "other_autoencoder")


@target("calm", "export", "resume")
def autoencoder_checkpoints_swapped(place):
  """The frozen autoencoder's checkpoints are another's of the same sizes."""
  replace(place.case / "autoencoder/checkpoints", place.root / "other_autoencoder/checkpoints")


@target("calm", "evaluate")
def autoencoder_config_edited(place):
  """The frozen autoencoder's config says another floor of its KL."""
  edit(place.case / "autoencoder/config.json", loss__kl_floor=0.25)


@target("autoencoder", "export", "resume")
def checkpoints_swapped(place):
  """The checkpoints are those of another run of the same sizes and steps."""
  replace(place.case / "checkpoints", place.root / "other_autoencoder/checkpoints")


@target("autoencoder", "export", "resume")
def checkpoint_swapped(place):
  """The last checkpoint is that of another run of the same sizes and steps."""
  replace(place.case / "checkpoints/4", place.root / "other_autoencoder/checkpoints/4")


@target("autoencoder", "resume")
def checkpoint_rest_swapped(place):
  """The optimizer's state is that of the checkpoint before."""
  replace(place.case / "checkpoints/4/rest", place.case / "checkpoints/2/rest")


@target("autoencoder", "export", "resume")
def checkpoint_renamed(place):
  """The last checkpoint bears the number of a later step."""
  (place.case / "checkpoints/4").rename(place.case / "checkpoints/5")


@target("autoencoder", "export", "resume")
def checkpoint_copied(place):
  """An earlier checkpoint lies in the place of the last."""
  replace(place.case / "checkpoints/4", place.case / "checkpoints/2")


@target("autoencoder", "resume", must_tell=True)
def checkpoints_removed(place):
  """All checkpoints were removed, as by rm -r checkpoints."""
  shutil.rmtree(place.case / "checkpoints")


@target("autoencoder", "resume")
def checkpoint_folder_in_the_way(place):
  """An empty folder bears the number of the step to come."""
  (place.case / "checkpoints/5").mkdir()


@target("autoencoder", "resume")
def checkpoint_newer_folder_in_the_way(place):
  """An empty folder bears the number of a step after the last."""
  (place.case / "checkpoints/9").mkdir()


@target("autoencoder", "resume", "export")
def checkpoint_is_a_file(place):
  """The last checkpoint is a file."""
  shutil.rmtree(place.case / "checkpoints/4")
  (place.case / "checkpoints/4").write_text("x")


@target("autoencoder", "resume", "export")
def checkpoints_are_a_file(place):
  """The folder of checkpoints is a file."""
  shutil.rmtree(place.case / "checkpoints")
  (place.case / "checkpoints").write_text("x")


def _meta(place: specimens.Place) -> pathlib.Path:
  return place.case / "checkpoints/4/meta/metadata"


@target("autoencoder", "resume")
def position_edited(place):
  """The last checkpoint says that fewer batches were read."""
  path = _meta(place)
  values = json.loads(path.read_text())
  values["data"] = {
    name: max(0, x - 1) if isinstance(x, int) else x for name, x in values["data"].items()
  }
  path.write_text(json.dumps(values))


@target("autoencoder", "resume")
def position_text(place):
  """The position of the data in the last checkpoint is text."""
  edit(_meta(place), data="here")


@target("autoencoder", "resume", "export")
def meta_list(place):
  """The meta of the last checkpoint is a list."""
  _meta(place).write_text("[1]")


@target("autoencoder", "resume", "export")
def meta_nested(place):
  """The meta of the last checkpoint is nested 100,000 deep."""
  nested(_meta(place))


@target("autoencoder", "export")
def meta_config_edited(place):
  """The config inside the last checkpoint's meta is another."""
  edit(_meta(place), config__model__width=17)


@target("calm", "evaluate", "generate", "export")
def config_rope_edited(place):
  """config.json has another rope_theta, which changes no shape."""
  edit(place.case / "config.json", model__rope_theta=500.0)


@target("calm", "evaluate", "generate", "export")
def config_heads_edited(place):
  """config.json has other numbers of heads, which change no shape."""
  edit(place.case / "config.json", model__heads=4, model__kv_heads=2)


@target("calm", "evaluate")
def config_dtype_edited(place):
  """config.json computes in bfloat16."""
  edit(place.case / "config.json", training__compute_dtype="bfloat16")


@target("calm", "evaluate")
def config_samples_edited(place):
  """config.json draws other numbers of samples."""
  edit(place.case / "config.json", loss__samples=6)


@target("calm", "export", "generate")
@target("transformer", "evaluate", "resume", "report")
def config_list(place):
  """config.json is a list."""
  (place.case / "config.json").write_text("[1]")


@target("transformer", "evaluate", "resume", "report", "export")
def config_nested(place):
  """config.json is nested 100,000 deep."""
  nested(place.case / "config.json")


@target("transformer", "evaluate", "export")
def config_part_is_a_list(place):
  """The model's settings in config.json are a list."""
  edit(place.case / "config.json", model=[1])


@target("transformer", "export")
def config_million_layers(place):
  """config.json has a million layers."""
  edit(place.case / "config.json", model__layers=10**6)


@target("transformer", "export", "report", "resume")
def config_fifo(place):
  """config.json is a pipe."""
  fifo(place.case / "config.json")


@target("transformer", "export")
def origin_fifo(place):
  """origin.json is a pipe."""
  fifo(place.case / "origin.json")


@target("transformer", "resume", "report")
def metrics_fifo(place):
  """metrics.jsonl is a pipe."""
  fifo(place.case / "metrics.jsonl")


@target("transformer", "generate")
def tokenizer_fifo(place):
  """The tokenizer is a pipe."""
  fifo(place.case / "tokenizer.model")


@target("transformer", "evaluate", "generate", "resume")
def origin_list(place):
  """origin.json is a list."""
  (place.case / "origin.json").write_text("[1]")


@target("transformer", "evaluate", "resume")
def origin_nested(place):
  """origin.json is nested 100,000 deep."""
  nested(place.case / "origin.json")


@target("calm", "generate", "export")
def origin_start_patch(place):
  """The patch that generation begins after is another."""
  edit(place.case / "origin.json", start_patch=[9, 8, 7, 6])


@target("calm", "generate")
def origin_start_patch_text(place):
  """The patch that generation begins after is no list of tokens."""
  edit(place.case / "origin.json", start_patch="abcd")


@target("calm", "generate")
def origin_start_patch_beyond(place):
  """The patch that generation begins after holds tokens that are not there."""
  edit(place.case / "origin.json", start_patch=[10**9, -1, 3, 4])


@target("transformer", "generate", "export")
def origin_eos(place):
  """origin.json names another token for EOS."""
  edit(place.case / "origin.json", eos_id=9)


@target("transformer", "generate", "export")
def origin_eos_beyond(place):
  """origin.json names a token for EOS that is not in the vocabulary."""
  edit(place.case / "origin.json", eos_id=10**6)


@target("transformer", "generate")
def origin_vocab_text(place):
  """The vocabulary's size in origin.json is text."""
  edit(place.case / "origin.json", vocab_size="many")


@target("transformer", "resume", "evaluate")
def origin_store_hash(place):
  """origin.json names another store."""
  edit(place.case / "origin.json", store_hash="0" * 16)


@target("calm", "evaluate", "resume")
def origin_autoencoder_fingerprint(place):
  """origin.json names another autoencoder."""
  edit(place.case / "origin.json", autoencoder_fingerprint="00000000")


@target("transformer", "generate", "export")
def tokenizer_swapped(place):
  """The workdir's tokenizer is another of the same size."""
  replace(place.case / "tokenizer.model", place.root / "other_store/tokenizer.model")


@target("transformer", "resume", must_tell=True)
def tokenizer_swapped_before_a_restart(place):
  """The workdir's tokenizer is another of the same size, and training goes on."""
  replace(place.case / "tokenizer.model", place.root / "other_store/tokenizer.model")


@target("transformer", "generate", "export", "resume")
def tokenizer_and_its_hash_swapped(place):
  """Tokenizer and its hash in origin.json are another's."""
  other = json.loads((place.root / "other_store/manifest.json").read_text())["tokenizer"]["hash"]
  replace(place.case / "tokenizer.model", place.root / "other_store/tokenizer.model")
  edit(place.case / "origin.json", tokenizer_hash=other)


@target("autoencoder", "export", "resume")
def rubbish_seal(place):
  """seal.json holds rubbish."""
  (place.case / "seal.json").write_text("[1, ")


# Side files of a workdir.


def _middle_line(place: specimens.Place, line: bytes) -> None:
  lines = lines_of(place.case / "metrics.jsonl")
  lines[1] = line + b"\n"
  (place.case / "metrics.jsonl").write_bytes(b"".join(lines))


@target("autoencoder", "resume", "report", must_tell=True, taken=True)
def metrics_rubbish_line(place):
  """A line of metrics.jsonl is rubbish."""
  _middle_line(place, b"rubbish")


@target("autoencoder", "resume", "report", must_tell=True, taken=True)
def metrics_list_line(place):
  """A line of metrics.jsonl is a list."""
  _middle_line(place, b"[1]")


@target("autoencoder", "resume", "report", must_tell=True, taken=True)
def metrics_line_without_step(place):
  """A line of metrics.jsonl has no step."""
  _middle_line(place, b'{"kind": "train"}')


@target("autoencoder", "resume", "report", must_tell=True, taken=True)
def metrics_text_for_step(place):
  """The step of a line of metrics.jsonl is text."""
  _middle_line(place, b'{"kind": "train", "step": "two"}')


@target("autoencoder", "resume", "report", must_tell=True, taken=True)
def metrics_no_utf8(place):
  """A line of metrics.jsonl is no UTF-8."""
  _middle_line(place, b'{"kind": "train", "step": 2, "x": "\xff\xfe"}')


@target("autoencoder", "resume", "report", must_tell=True, taken=True)
def metrics_nested_line(place):
  """A line of metrics.jsonl is nested 100,000 deep."""
  _middle_line(place, b"[" * 100_000)


@target("autoencoder", "report", taken=True)
def metrics_odd_figures(place):
  """Figures in metrics.jsonl are text, lists and huge."""
  lines = [json.loads(line) for line in lines_of(place.case / "metrics.jsonl")]
  for line, odd in zip(lines, ("x", [1], 10**400, None), strict=False):
    line |= {"loss": odd, "tokens_per_second": odd, "time": odd}
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (place.case / "metrics.jsonl").write_text(text)


@target("autoencoder", "resume", "report")
def metrics_are_a_folder(place):
  """metrics.jsonl is a folder."""
  (place.case / "metrics.jsonl").unlink()
  (place.case / "metrics.jsonl").mkdir()


def _ledger(place: specimens.Place) -> pathlib.Path:
  return sorted((place.case / "ledger").glob("*.json"))[0]


@target("autoencoder", "resume", "report", must_tell=True, taken=True)
def ledger_empty(place):
  """A file of the ledger is empty."""
  _ledger(place).write_bytes(b"")


@target("autoencoder", "resume", "report", taken=True)
def ledger_list(place):
  """A file of the ledger is a list."""
  _ledger(place).write_text("[1]")


@target("autoencoder", "report", taken=True)
def ledger_without_seconds(place):
  """A file of the ledger lacks what it is for."""
  _ledger(place).write_text('{"started": 1, "written": "x"}')


@target("autoencoder", "resume", "report", taken=True)
def ledger_name(place):
  """A file in the ledger's folder has no number for a name."""
  (place.case / "ledger/copy of 0001.json").write_text("{}")


@target("autoencoder", "resume", taken=True)
def ledger_is_a_file(place):
  """The ledger's folder is a file."""
  shutil.rmtree(place.case / "ledger")
  (place.case / "ledger").write_text("x")


@target("transformer", "generate", "report", taken=True)
def samples_torn(place):
  """The last line of samples.jsonl is torn."""
  path = place.case / "samples.jsonl"
  path.write_bytes(path.read_bytes()[:-20])


@target("transformer", "generate", "report", taken=True)
def samples_list_line(place):
  """A line of samples.jsonl is a list."""
  path = place.case / "samples.jsonl"
  path.write_bytes(b"[1]\n" + path.read_bytes())


@target("transformer", "report", taken=True)
def samples_odd(place):
  """Values of a text in samples.jsonl are of other types."""
  path = place.case / "samples.jsonl"
  line = json.loads(lines_of(path)[0])
  odd = {name: [1] for name in line if name not in ("prompt", "text")}
  path.write_text(json.dumps(line | odd) + "\n")


@target("transformer", "report", "export", taken=True)
def evaluation_list(place):
  """evaluation.json is a list."""
  (place.case / "evaluation.json").write_text("[1]")


@target("transformer", "report", "export", taken=True)
def evaluation_nested(place):
  """evaluation.json is nested 100,000 deep."""
  nested(place.case / "evaluation.json")


@target("transformer", "report", "export", taken=True)
def evaluation_odd(place):
  """Figures in evaluation.json are lists."""
  path = place.case / "evaluation.json"
  path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), [1])))


@target("transformer", "report", "export", taken=True)
def evaluation_text(place):
  """Figures in evaluation.json are text."""
  path = place.case / "evaluation.json"
  path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), "x")))


@target("transformer", "report", taken=True)
def temperature_list(place):
  """temperature.json is a list."""
  (place.case / "temperature.json").write_text("[1]")


@target("transformer", "report", taken=True)
def temperature_rows(place):
  """The rows of temperature.json are no list of rows."""
  (place.case / "temperature.json").write_text('{"rows": {"x": 1}, "baseline": 3}')


# Exported folders; those of other makers have no sums.


def _foreign(place: specimens.Place) -> pathlib.Path:
  for path in place.case.rglob("SHA256SUMS"):
    path.unlink()
  return place.case


def _reweigh(folder: pathlib.Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
  path = folder / tensors.SAFETENSORS
  weights = safetensors.load_file(path)
  change(weights)
  safetensors.save_file(weights, path, metadata={"format": "pt"})


def _first(value: float) -> Callable[[dict[str, np.ndarray]], None]:
  def change(weights: dict[str, np.ndarray]) -> None:
    weights[max(weights)].flat[0] = value

  return change


@target("llama", "import")
@target("reference_calm", "import")
def weights_nan(place):
  """A weight of another maker's folder is NaN."""
  _reweigh(_foreign(place), _first(np.nan))


@target("llama", "import")
def weights_inf(place):
  """A weight of another maker's folder is infinite."""
  _reweigh(_foreign(place), _first(np.inf))


@target("llama_bin", "import")
def bin_deflated(place):
  """A .bin file was packed again, with compression."""
  path = place.case / tensors.PICKLE
  with zipfile.ZipFile(path) as old:
    content = {name: old.read(name) for name in old.namelist()}
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
    for name, value in content.items():
      new.writestr(name, value)


@target("llama_bin", "import")
def bin_data_changed(place):
  """A byte of a tensor in a .bin file is another, and the archive's sum of it is not."""
  path = place.case / tensors.PICKLE
  with zipfile.ZipFile(path) as old:
    entry = max(old.infolist(), key=lambda entry: entry.file_size)
    content = old.read(entry)
  changed = path.read_bytes()
  at = changed.index(content) + len(content) // 2
  path.write_bytes(changed[:at] + bytes([changed[at] ^ 0x40]) + changed[at + 1 :])


@target("llama", "import")
@target("reference_calm", "import")
def weights_swapped(place):
  """Two tensors of one shape have each other's names in an export of ours."""

  def change(weights: dict[str, np.ndarray]) -> None:
    first, second = sorted(name for name in weights if name.endswith("mlp.up_proj.weight"))[:2]
    weights[first], weights[second] = weights[second], weights[first]

  _reweigh(place.case, change)


@target("llama", "import")
def weight_changed(place):
  """A weight in an export of ours is another."""
  _reweigh(place.case, _first(1.5))


@target("llama_shards", "import")
def shards_exchanged(place):
  """Two shards have each other's names."""
  first, second = sorted(place.case.glob("model-*.safetensors"))[:2]
  first.rename(place.case / "x")
  second.rename(first)
  (place.case / "x").rename(second)


def _index(place: specimens.Place) -> pathlib.Path:
  return place.case / f"{tensors.SAFETENSORS}.index.json"


@target("llama_shards", "import")
def index_wrong(place):
  """The index says that a tensor is in another shard."""
  values = json.loads(_index(place).read_text())
  names = values["weight_map"]
  names[min(names)] = names[max(names)] = sorted(set(names.values()))[1]
  _index(place).write_text(json.dumps(values))


@target("llama_shards", "import")
def index_list(place):
  """The index is a list."""
  _index(place).write_text("[1]")


@target("llama_shards", "import")
def index_nested(place):
  """The index is nested 100,000 deep."""
  nested(_index(place))


@target("llama_shards", "import")
def index_outside(place):
  """The index names a file outside the folder."""
  values = json.loads(_index(place).read_text())
  values["weight_map"] = dict.fromkeys(values["weight_map"], "../llama/model.safetensors")
  _index(place).write_text(json.dumps(values))


@target("llama_shards", "import")
def index_of_folders(place):
  """The index names a folder."""
  (place.case / "folder").mkdir()
  values = json.loads(_index(place).read_text())
  values["weight_map"] = dict.fromkeys(values["weight_map"], "folder")
  _index(place).write_text(json.dumps(values))


def _edit_config(**changes: Any) -> Strike:
  return lambda place: edit(_foreign(place) / "config.json", **changes)


for _name, _specimen, _doc, _changes in (
  ("million_layers", "llama", "config.json has a million layers.", {"num_hidden_layers": 10**6}),
  ("huge_vocabulary", "llama", "The vocabulary has 2^40 tokens.", {"vocab_size": 2**40}),
  ("huge_context", "llama", "The context is 2^31 tokens.", {"max_position_embeddings": 2**31}),
  ("context_of_one", "llama", "The context is one token.", {"max_position_embeddings": 1}),
  ("rope_infinite", "llama", "rope_theta is infinite.", {"rope_theta": float("inf")}),
  ("rope_list", "llama", "rope_theta is a list.", {"rope_theta": [1]}),
  ("rope_parameters_list", "llama", "rope_parameters are a list.", {"rope_parameters": [1]}),
  ("eos_beyond", "llama", "EOS is no token.", {"eos_token_id": 10**9}),
  ("heads_text", "llama", "The number of heads is text.", {"num_attention_heads": "two"}),
  ("heads_odd", "llama", "The heads do not divide the width.", {"num_attention_heads": 3}),
  ("huge_blocks", "reference_calm", "The head has a million blocks.", {"num_mlp_layers": 10**6}),
  ("samples_huge", "reference_calm", "N is 10^30.", {"num_samples": 10**30}),
  ("beta_negative", "reference_calm", "The exponent is -1.", {"beta": -1}),
  ("path_list", "reference_calm", "The autoencoder's path is a list.", {"ae_path": [1]}),
):
  _strike = _edit_config(**_changes)
  _strike.__name__, _strike.__doc__ = f"import_{_name}", _doc
  target(_specimen, "import", taken=True)(_strike)


@target("llama", "import")
def export_config_edited(place):
  """An export of ours says other numbers of heads, which change no shape."""
  edit(place.case / "config.json", num_attention_heads=4, num_key_value_heads=2)


@target("llama", "import")
def export_rope_edited(place):
  """An export of ours says another rope_theta."""
  edit(place.case / "config.json", rope_theta=500.0)


@target("llama", "import")
@target("reference_calm", "import")
def export_tokenizer_swapped(place):
  """An export of ours holds another tokenizer of the same size."""
  replace(place.case / "tokenizer.model", place.root / "other_store/tokenizer.model")


@target("llama", "import")
def import_config_list(place):
  """config.json of a folder is a list."""
  (_foreign(place) / "config.json").write_text("[1]")


@target("llama", "import")
def import_config_nested(place):
  """config.json of a folder is nested 100,000 deep."""
  nested(_foreign(place) / "config.json")


@target("llama", "import")
def import_config_fifo(place):
  """config.json of a folder is a pipe."""
  fifo(_foreign(place) / "config.json")


@target("llama", "import")
def import_weights_fifo(place):
  """The weights of a folder are a pipe."""
  fifo(_foreign(place) / tensors.SAFETENSORS)


@target("llama_bin", "import")
def import_bin_fifo(place):
  """The .bin weights of a folder are a pipe."""
  fifo(place.case / tensors.PICKLE)


@target("llama", "import")
def import_tokenizer_fifo(place):
  """The tokenizer of a folder is a pipe."""
  fifo(_foreign(place) / "tokenizer.model")


@target("reference_calm", "import")
def table_of_width_zero(place):
  """The token table of a folder has no columns."""

  def change(weights: dict[str, np.ndarray]) -> None:
    for name in [name for name in weights if "embed_tokens" in name]:
      weights[name] = np.zeros((len(weights[name]), 0), np.float32)

  _reweigh(_foreign(place), change)


@target("llama", "import")
def header_huge(place):
  """The weights' file says that its header has 2^62 bytes."""
  path = _foreign(place) / tensors.SAFETENSORS
  path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
