"""Toy stores, workdirs and exported folders of every kind, and the acts that read them."""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from calm_jax import workdir
from calm_jax.data import store as store_lib
from calm_jax.data import store_writer
from calm_jax.interchange import tensors
from calm_jax.running import accounts, loading
from calm_jax.training import reporter
from harm import forked

STAGES = ("autoencoder", "calm", "transformer")
STEPS, STOPPED_AT = 5, 4
# Figures of a report that depend on the clock.
TIMED = {"time", "seconds", "data_wait_share", "tokens_per_second", "patches_per_second"}
COMMON = {
  "data.context": 32,
  "training.steps": STEPS,
  "training.batch": 8,
  "training.log_every": 1,
  "training.eval_every": 0,
  "training.eval_blocks": 4,
  "training.checkpoint_every": 2,
  "training.compute_dtype": "float32",
  "optimizer.warmup_steps": 2,
  "mesh.fsdp": 1,
}
BACKBONE = {
  "model.layers": 2,
  "model.width": 16,
  "model.ffn": 32,
  "model.heads": 2,
  "model.kv_heads": 1,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
  "autoencoder": {"model.width": 16, "model.ffn": 32, "model.latent": 8},
  "calm": {**BACKBONE, "head.blocks": 1, "head.noise": 4, "loss.samples": 4},
  "transformer": BACKBONE,
}
# Exported specimen -> its workdir and its format.
EXPORTS = {
  "reference_calm": ("calm", "reference"),
  "reference_autoencoder": ("autoencoder", "reference"),
  "torch_calm": ("calm", "torch"),
  "llama": ("transformer", "llama"),
  "llama_shards": ("transformer", "llama"),
}

Result = Callable[["Place", str], Any]


@dataclasses.dataclass(frozen=True)
class Place:
  """Where an act runs.

  Attributes:
    root: folder of all specimens.
    folder: working folder, which holds `case`, a copy of a specimen, and `out`, the act's output.
    specimen: name of the specimen.
  """

  root: pathlib.Path
  folder: pathlib.Path
  specimen: str

  @property
  def case(self) -> pathlib.Path:
    return self.folder / "case"

  @property
  def out(self) -> pathlib.Path:
    return self.folder / "out"

  def lay(self) -> None:
    """Makes a new copy of the specimen and removes the output."""
    for path in (self.case, self.out):
      clear(path)
    shutil.copytree(self.root / self.specimen, self.case)


@dataclasses.dataclass(frozen=True)
class Act:
  """A way to read a specimen.

  Attributes:
    command: returns the command.
    result: returns the result as JSON values, given standard output.
  """

  command: Callable[[Place], forked.Command]
  result: Result


def clear(path: pathlib.Path) -> None:
  """Removes a file or folder if it exists."""
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def table(
  heading: Sequence[str],
  counts: Mapping[tuple[str, str], collections.Counter[str]],
  classes: Sequence[str],
) -> str:
  """Returns counts as a table of text; the row of all cases comes last."""
  rows = [tuple(heading)]
  for names, row in sorted(counts.items(), key=lambda item: (item[0][0] == "all", item[0])):
    rows.append((*names, str(row.total()), *(str(row[name]) for name in classes)))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def sha(path: pathlib.Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(folder: pathlib.Path) -> dict[str, str]:
  """Returns the digest of every file below a folder, by path."""
  paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
  return {str(path.relative_to(folder)): sha(path) for path in paths}


def _act(name: str, *flags: str) -> forked.Command:
  return forked.Command((f"calm_jax.{name}", *flags))


def train_command(
  root: pathlib.Path, stage: str, directory: pathlib.Path, data: pathlib.Path, **changes: Any
) -> forked.Command:
  """Returns the command that trains a toy; names in `changes` have __ in place of dots."""
  settings = {**COMMON, **MODELS[stage], "data.path": data}
  if stage == "calm":
    settings["autoencoder"] = root / "autoencoder"
  settings |= {name.replace("__", "."): value for name, value in changes.items()}
  flags = [f"--config.{name}={value}" for name, value in settings.items()]
  return _act("main", f"--config=configs/{stage}.py:quickstart", f"--workdir={directory}", *flags)


def prepare_command(root: pathlib.Path, output: pathlib.Path, corpus="corpus") -> forked.Command:
  places = (f"--input={root}/{corpus}", f"--output={output}")
  return _act("prepare", *places, "--tokenizer=train:300", "--heldout=0.2", "--workers=1")


def store_content(path: pathlib.Path) -> dict[str, Any]:
  """Returns the complete content of a store, as a reader sees it."""
  opened = store_lib.TokenStore.open(str(path))
  arrays = {}
  for split in store_lib.SPLITS:
    tokens = opened.read(split, 0, opened.num_tokens(split))
    arrays[split] = [
      hashlib.sha256(x.tobytes()).hexdigest() for x in (tokens, opened.offsets(split))
    ]
  return {"hash": opened.hash, "manifest": dataclasses.asdict(opened.manifest), "arrays": arrays}


def checkpoint_meta(directory: pathlib.Path, step: int) -> dict[str, Any]:
  """Returns the fingerprints of a checkpoint and its data position."""
  meta = json.loads((directory / "checkpoints" / str(step) / "meta/metadata").read_text())
  return {name: meta[name] for name in ("params_fingerprint", "rest_fingerprint", "data")}


def _reports(directory: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the reports of a run without figures that depend on the clock."""
  reports = map(json.loads, (directory / workdir.METRICS).read_text().splitlines())
  return [{name: x for name, x in report.items() if name not in TIMED} for report in reports]


def trained(directory: pathlib.Path, step: int = STEPS) -> dict[str, Any]:
  """Returns the result of a finished run."""
  origin = json.loads((directory / "origin.json").read_text())
  reports = _reports(directory)
  return {
    "checkpoint": checkpoint_meta(directory, step),
    "last": [report for report in reports if report["step"] == step],
    "past": [report for report in reports if report["step"] < step],
    "origin": origin,
    "tokenizer": sha(directory / origin["tokenizer_file"]),
  }


def imported(directory: pathlib.Path) -> dict[str, Any]:
  """Returns the complete content of a workdir, as a reader sees it."""
  loaded = loading.load(str(directory))
  models = [loaded, *loaded.parents.values()]
  return {
    "runs": [dataclasses.asdict(model.run) for model in models],
    "origins": [dataclasses.asdict(model.origin) for model in models],
    "params": [_digest_of(model.params) for model in models],
    "tokenizer": workdir.tokenizer(str(directory), loaded.origin).hash,
  }


def _digest_of(params: Any) -> str:
  content = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(params))
  return hashlib.sha256(content).hexdigest()


def _reported(place: Place, printed: str) -> dict[str, Any]:
  """Returns the page of a report, and its notes."""
  html = (place.out / "report.html").read_text()
  account = accounts.read(str(place.case))
  return {"page": html, "notes": list(account.notes)}


def _generated(place: Place, printed: str) -> dict[str, Any]:
  """Returns the text as printed and as saved; a truncated line before must not swallow it."""
  line = (place.case / workdir.SAMPLES).read_text().splitlines()[-1]
  return {"printed": printed, "kept": json.loads(line)["text"]}


def _resume(place: Place) -> forked.Command:
  return train_command(place.root, place.specimen, place.case, place.root / "store")


ACTS: Mapping[str, Act] = {
  "read": Act(
    lambda place: forked.Command(call=lambda: store_content(place.case) and None),
    lambda place, printed: store_content(place.case),
  ),
  "prepare": Act(
    lambda place: prepare_command(place.root, place.case),
    lambda place, printed: store_content(place.case),
  ),
  "train": Act(
    lambda place: train_command(
      place.root, "transformer", place.out, place.case, training__steps=1
    ),
    lambda place, printed: trained(place.out, 1),
  ),
  "verify": Act(
    lambda place: _act("verify", str(place.case)),
    lambda place, printed: store_content(place.case),
  ),
  "resume": Act(_resume, lambda place, printed: trained(place.case)),
  "export": Act(
    lambda place: _act(
      "convert", f"--source={place.case}", f"--output={place.out}", "--format=reference"
    ),
    lambda place, printed: digests(place.out),
  ),
  "evaluate": Act(
    lambda place: _act("evaluate", f"--workdir={place.case}", "--blocks=8", "--batch=8"),
    lambda place, printed: json.loads(printed),
  ),
  "generate": Act(
    lambda place: _act(
      "generate", f"--workdir={place.case}", "--prompt=The cats", "--max_tokens=8"
    ),
    _generated,
  ),
  "report": Act(
    lambda place: _act("report", f"--workdir={place.case}", f"--output={place.out}"), _reported
  ),
  "import": Act(
    lambda place: _act(
      "convert", f"--source={place.case}", f"--output={place.out}", "--format=workdir"
    ),
    lambda place, printed: imported(place.out),
  ),
}


class Builder:
  """Makes the specimens below a folder unless they exist."""

  def __init__(self, root: pathlib.Path):
    self._root = root
    self._work = root / "building"

  def build(self) -> list[str]:
    """Returns the names of the specimens."""
    done = self._root / "specimens.json"
    if not done.exists():
      for path in self._root.iterdir():
        if path.is_dir() and path.name != "compiled":
          shutil.rmtree(path)
      self._work.mkdir()
      names = [*self._stores(), *self._workdirs(), *self._exported()]
      done.write_text(json.dumps(names))
    return json.loads(done.read_text())

  def _run(self, command: forked.Command, *codes: int, before=lambda: None) -> None:
    ending = forked.run(command, self._work, before=before, limit=300)
    assert ending.code in (codes or (0,)), (command.words, ending.code, ending.stderr)

  def _stores(self) -> list[str]:
    for name, animal in (("corpus", "cats"), ("other_corpus", "dogs")):
      (self._root / name).mkdir()
      lines = (
        json.dumps({"text": f"The {i} {animal} of number {i % 17} said: {'woo, ' * (i % 5)}so."})
        for i in range(400)
      )
      (self._root / name / "text.jsonl").write_text("\n".join(lines))

    def interrupt_before_writing() -> None:
      def interrupt(*_, **__):
        raise KeyboardInterrupt

      store_writer.write = interrupt

    parts = prepare_command(self._root, self._root / "parts")
    self._run(parts, 130, before=interrupt_before_writing)
    self._run(prepare_command(self._root, self._root / "store"))
    self._run(prepare_command(self._root, self._root / "other_store", "other_corpus"))
    return ["store", "parts"]

  def _workdirs(self) -> list[str]:
    root = self._root
    for stage in STAGES:
      self._run(train_command(root, stage, root / stage, root / "store"), 75, before=_stop)
    other = root / "other_autoencoder"
    self._run(
      train_command(root, "autoencoder", other, root / "store", training__seed=1), 75, before=_stop
    )
    for stage in STAGES:
      self._run(_act("evaluate", f"--workdir={root}/{stage}", "--blocks=8", "--batch=8"))
      if stage != "autoencoder":
        flags = (f"--workdir={root}/{stage}", "--prompt=The cats", "--max_tokens=8")
        self._run(_act("generate", *flags))
    return list(STAGES)

  def _exported(self) -> list[str]:
    def use_small_shards() -> None:
      tensors.SHARD_BYTES = 8_000

    for name, (source, kind) in EXPORTS.items():
      words = (f"--source={self._root / source}", f"--output={self._root / name}")
      before = use_small_shards if name == "llama_shards" else lambda: None
      self._run(_act("convert", *words, f"--format={kind}"), before=before)
    try:
      import torch
    except ImportError:
      return list(EXPORTS)
    from safetensors import numpy as safetensors

    pickled = self._root / "llama_bin"
    shutil.copytree(self._root / "llama", pickled)
    (pickled / "SHA256SUMS").unlink(missing_ok=True)  # Like a folder of another framework.
    weights = safetensors.load_file(pickled / tensors.SAFETENSORS)
    torch.save({name: torch.tensor(x) for name, x in weights.items()}, pickled / tensors.PICKLE)
    (pickled / tensors.SAFETENSORS).unlink()
    return [*EXPORTS, "llama_bin"]


def _stop() -> None:
  """Makes the run stop by SIGTERM one step before its end."""
  push = reporter.Reporter.push

  def pushed(self, done, *arguments):
    result = push(self, done, *arguments)
    if done == STOPPED_AT:
      os.kill(os.getpid(), signal.SIGTERM)
    return result

  reporter.Reporter.push = pushed
