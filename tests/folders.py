"""Helpers of tests of conversions: read, change and compare the golden folders."""

import json
import pathlib

import jax
import numpy as np
from safetensors import numpy as safetensors

from calm_jax.interchange import checking
from calm_jax.running import conversion, loading
from calm_jax.training import trained as trained_lib

GOLDEN = pathlib.Path(__file__).parent / "testdata/golden"
VOCAB = {"k4": 101, "k2_gqa": 97}

Weights = dict[str, np.ndarray]


def weights(folder: pathlib.Path) -> Weights:
  return safetensors.load_file(folder / "model.safetensors")


def with_table_twice(loaded: Weights) -> Weights:
  """Returns the weights as we export them: the autoencoder's table has its decoder's name too."""
  table = "encoder.embed_tokens.weight"
  tables = {name: x for name, x in loaded.items() if name in (table, f"ae_model.{table}")}
  return loaded | {n.replace(table, "decoder.lm_head_weight"): x for n, x in tables.items()}


def rewrite(folder: pathlib.Path, changed: Weights) -> None:
  safetensors.save_file(changed, folder / "model.safetensors")


def set_config(folder: pathlib.Path, **values) -> None:
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


def split(loaded: Weights) -> tuple[Weights, Weights]:
  names = sorted(loaded)
  return {n: loaded[n] for n in names[::2]}, {n: loaded[n] for n in names[1::2]}


def sharded(folder: pathlib.Path) -> None:
  """Replaces the weights of a folder by two shards and an index."""
  file_of = {}
  for number, shard in enumerate(split(weights(folder))):
    file = f"model-{number}.safetensors"
    safetensors.save_file(shard, folder / file)
    file_of |= dict.fromkeys(shard, file)
  (folder / "model.safetensors").unlink()
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))


def converted(folder: pathlib.Path, **options) -> trained_lib.Trained:
  """Imports a folder and returns the model of the workdir."""
  output = folder.parent / f"{folder.name}_workdir"
  conversion.convert(str(folder), str(output), "workdir", **options)
  return loading.load(str(output))


def all_params(trained: trained_lib.Trained):
  return trained.params, {name: parent.params for name, parent in trained.parents.items()}


def assert_same(a, b) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


def agree(actual, expected, tolerance: float = 1e-5) -> None:
  """Asserts equal shapes and a largest error relative to the largest expected value."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape
  assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def require_temperature_input(source: pathlib.Path, output: pathlib.Path, kind: str) -> None:
  """Exports a tempered head and compares the draws of the folder's own card at temperatures.

  At 1 and above the language model's own head draws; below 0.25 the draws are those at 0.25.
  """
  conversion.convert(str(source), str(output), kind)
  assert checking.shapes(output)
  trained = loading.load(str(source))
  model = trained.parents["calm"]
  token_BK = np.random.default_rng(0).integers(0, 300, (3, 4)).astype(np.int32)
  noise = np.array(trained.model.head.draw_noise(jax.random.key(0), (2, 3)))
  code = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
  tokens = token_BK.astype(np.int64) if kind == "onnx" else token_BK
  for value, reached in ((2.0, 1.0), (1.0, 1.0), (0.5, 0.5), (0.1, 0.25)):
    scope = {"tokens": tokens, "noise": noise, "temperature": np.float32(value)}
    exec(code.replace("FOLDER", str(output)), scope)
    latents = scope["mean"][:, None] if model.run.model.reads_latents else None
    hidden_B1D, _ = model.model.hidden(model.params, token_BK[:, None], latents)
    condition = trained.model.condition(trained.params, hidden_B1D[:, 0], np.full(3, 1 / reached))
    sample_NBZ = trained.model.samples(trained.params, condition, noise)
    if reached == 1:
      sample_NBZ = model.model.samples(model.params, hidden_B1D[:, 0], noise)
    agree(scope["latents"], sample_NBZ)
