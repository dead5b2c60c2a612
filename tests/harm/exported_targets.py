"""Named damage to exported folders; those of other frameworks have no checksums."""

import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors import numpy as safetensors

from calm_jax.interchange import tensors
from harm import specimens
from harm.targets import Strike, edit, fifo, nested, replace, target


def _foreign(place: specimens.Place) -> pathlib.Path:
  """Removes the checksums, as in a folder of another framework, and returns the folder."""
  for path in place.case.rglob("SHA256SUMS"):
    path.unlink()
  return place.case


def _change_weights(folder: pathlib.Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
  """Applies a function to the weights of a folder in place."""
  path = folder / tensors.SAFETENSORS
  weights = safetensors.load_file(path)
  change(weights)
  safetensors.save_file(weights, path, metadata={"format": "pt"})


def _set_one(value: float) -> Callable[[dict[str, np.ndarray]], None]:
  """Returns a function that sets one weight."""

  def change(weights: dict[str, np.ndarray]) -> None:
    weights[max(weights)].flat[0] = value

  return change


@target("llama", "import")
@target("reference_calm", "import")
def weights_nan(place):
  """A weight of a foreign folder is NaN."""
  _change_weights(_foreign(place), _set_one(np.nan))


@target("llama", "import")
def weights_inf(place):
  """A weight of a foreign folder is infinite."""
  _change_weights(_foreign(place), _set_one(np.inf))


@target("llama_bin", "import")
def bin_deflated(place):
  """A .bin file was repacked with compression."""
  path = place.case / tensors.PICKLE
  with zipfile.ZipFile(path) as old:
    content = {name: old.read(name) for name in old.namelist()}
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
    for name, value in content.items():
      new.writestr(name, value)


@target("llama_bin", "import")
def bin_data_changed(place):
  """A byte of a tensor in a .bin file was changed, but not the archive's checksum."""
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
  """Two tensors of the same shape in an export of ours were swapped."""

  def change(weights: dict[str, np.ndarray]) -> None:
    first, second = sorted(name for name in weights if name.endswith("mlp.up_proj.weight"))[:2]
    weights[first], weights[second] = weights[second], weights[first]

  _change_weights(place.case, change)


@target("llama", "import")
def weight_changed(place):
  """A weight in an export of ours was changed."""
  _change_weights(place.case, _set_one(1.5))


@target("llama_shards", "import")
def shards_exchanged(place):
  """The names of two shards were swapped."""
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
  ("eos_beyond", "llama", "EOS is not a token.", {"eos_token_id": 10**9}),
  ("heads_text", "llama", "The number of heads is text.", {"num_attention_heads": "two"}),
  ("heads_odd", "llama", "The heads do not divide the width.", {"num_attention_heads": 3}),
  ("huge_blocks", "reference_calm", "The head has a million blocks.", {"num_mlp_layers": 10**6}),
  ("samples_huge", "reference_calm", "N is 10^30.", {"num_samples": 10**30}),
  ("beta_negative", "reference_calm", "The exponent is -1.", {"beta": -1}),
  ("path_list", "reference_calm", "The autoencoder's path is a list.", {"ae_path": [1]}),
):
  _strike = _edit_config(**_changes)
  _strike.__name__, _strike.__doc__ = f"import_{_name}", _doc
  target(_specimen, "import", accepted=True)(_strike)


@target("llama", "import")
def export_config_edited(place):
  """config.json of an export of ours has other numbers of heads, which change no shape."""
  edit(place.case / "config.json", num_attention_heads=4, num_key_value_heads=2)


@target("llama", "import")
def export_rope_edited(place):
  """config.json of an export of ours has another rope_theta."""
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

  _change_weights(_foreign(place), change)


@target("llama", "import")
def header_huge(place):
  """The weights' file says that its header has 2^62 bytes."""
  path = _foreign(place) / tensors.SAFETENSORS
  path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
