"""What tests of conversions share: the golden folders, and how they are read, changed, compared."""

import json
import pathlib

import jax
import numpy as np
from safetensors import numpy as safetensors

from calm_jax.running import conversion, loading
from calm_jax.training import trained as trained_lib

GOLDEN = pathlib.Path(__file__).parent / "testdata/golden"
VOCAB = {"k4": 101, "k2_gqa": 97}

Weights = dict[str, np.ndarray]


def weights(folder: pathlib.Path) -> Weights:
  return safetensors.load_file(folder / "model.safetensors")


def with_table_twice(held: Weights) -> Weights:
  """The weights as we write them: the autoencoder's table under its decoder's name, too."""
  table = "encoder.embed_tokens.weight"
  found = {name: x for name, x in held.items() if name in (table, f"ae_model.{table}")}
  return held | {n.replace(table, "decoder.lm_head_weight"): x for n, x in found.items()}


def rewrite(folder: pathlib.Path, changed: Weights) -> None:
  safetensors.save_file(changed, folder / "model.safetensors")


def set_config(folder: pathlib.Path, **values) -> None:
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


def split(held: Weights) -> tuple[Weights, Weights]:
  names = sorted(held)
  return {n: held[n] for n in names[::2]}, {n: held[n] for n in names[1::2]}


def sharded(folder: pathlib.Path) -> None:
  where = {}
  for number, shard in enumerate(split(weights(folder))):
    file = f"model-{number}.safetensors"
    safetensors.save_file(shard, folder / file)
    where |= dict.fromkeys(shard, file)
  (folder / "model.safetensors").unlink()
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def converted(folder: pathlib.Path, **options) -> trained_lib.Trained:
  """The workdir that a folder becomes."""
  output = folder.parent / f"{folder.name}_workdir"
  conversion.convert(str(folder), str(output), "workdir", **options)
  return loading.load(str(output))


def all_params(trained: trained_lib.Trained):
  return trained.params, {name: parent.params for name, parent in trained.parents.items()}


def assert_same(a, b) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


def agree(found, expected, tolerance: float = 1e-5) -> None:
  """Asserts a shape and a largest error, relative to the largest value expected."""
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.shape == expected.shape
  assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
