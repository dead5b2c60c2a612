"""Claims about exported ONNX graphs: patch by patch they compute the same numbers as we do."""

import json
import pathlib

import jax
import numpy as np
import pytest
from folders import GOLDEN, agree, require_temperature_input

from calm_jax import errors
from calm_jax.interchange import to_onnx
from calm_jax.models import calm
from calm_jax.running import conversion, loading

for package in ("torch", "transformers", "onnxscript", "onnxruntime"):
  pytest.importorskip(package, reason="graphs are made by torch and run by onnxruntime")


@pytest.mark.parametrize("model", ["energy", "flow"])
def test_the_graphs_compute_the_same_samples_patch_by_patch(
  model: str, words, tmp_path: pathlib.Path
):
  """Runs the code of the folder's own card, with batch 3 and 2 candidates."""
  conversion.convert(
    str(GOLDEN / "k2_gqa" / model), str(tmp_path / "in"), "workdir", tokenizer=words(97)
  )
  conversion.convert(str(tmp_path / "in"), str(tmp_path / "out"), "onnx")
  trained = loading.load(str(tmp_path / "in"))
  rng = np.random.default_rng(0)
  token_PBK = rng.integers(0, 97, (4, 3, 2))
  noise = np.array(trained.model.head.draw_noise(jax.random.key(0), (2, 3)))
  code = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
  scope = {"tokens": token_PBK[0], "noise": noise}
  exec(code.replace("FOLDER", str(tmp_path / "out")), scope)

  parent = trained.parents["autoencoder"]
  autoencoder, frozen = parent.model, parent.params
  mean, log_std = autoencoder.apply({"params": frozen}, token_PBK[0], method="encode")
  agree(scope["mean"], mean, 1e-5)
  agree(scope["log_std"], log_std, 1e-5)
  agree(scope["logits"], autoencoder.apply({"params": frozen}, mean, method="decode"), 1e-5)
  for patch in range(4):
    if patch:
      step = {"tokens": token_PBK[patch], "position": np.array(patch, np.float32), "noise": noise}
      outputs = scope["next_patch"].run(None, step | scope["past"])
      scope["candidates"], scope["latents"], *present = outputs
      scope["past"] = dict(zip(scope["past"], present, strict=True))
    text_BPK = np.moveaxis(token_PBK[: patch + 1], 0, 1)
    hidden_BPD, _ = trained.model.hidden(trained.params, text_BPK)
    sample_NBZ = trained.model.samples(trained.params, hidden_BPD[:, -1], noise)
    agree(scope["latents"], sample_NBZ, 1e-5)
    expected = calm.decode_tokens(autoencoder, frozen, sample_NBZ)
    np.testing.assert_array_equal(scope["candidates"], expected)
  facts = json.loads((tmp_path / "out/config.json").read_text())
  assert facts["window_patches"] == 2047


def test_the_graphs_read_latents_as_input(latent_reader, tmp_path):
  """Runs the code of the folder's own card, which feeds the mean of the posterior."""
  source = latent_reader("continuous")
  conversion.convert(source, str(tmp_path / "out"), "onnx")
  trained = loading.load(source)
  token_BK = np.random.default_rng(0).integers(0, 300, (3, 4))
  noise = np.array(trained.model.head.draw_noise(jax.random.key(0), (2, 3)))
  code = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
  scope = {"tokens": token_BK, "noise": noise}
  exec(code.replace("FOLDER", str(tmp_path / "out")), scope)
  parent = trained.parents["autoencoder"]
  autoencoder, frozen = parent.model, parent.params
  mean, _ = autoencoder.apply({"params": frozen}, token_BK, method="encode")
  hidden_B1D, _ = trained.model.hidden(trained.params, token_BK[:, None], mean[:, None])
  agree(scope["latents"], trained.model.samples(trained.params, hidden_B1D[:, 0], noise), 1e-5)


@pytest.mark.parametrize("kind", ["energy", "flow"])
def test_the_graph_of_a_tempered_head_reads_the_temperature(kind, other_tempered, tmp_path):
  require_temperature_input(other_tempered(kind, "both"), tmp_path / "out", "onnx")


def test_an_autoencoder_is_exported_without_next_patch(trained_autoencoder, tmp_path):
  conversion.convert(str(trained_autoencoder), str(tmp_path / "out"), "onnx")
  scope = {"tokens": np.arange(8).reshape(2, 4)}
  code = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
  exec(code.replace("FOLDER", str(tmp_path / "out")), scope)
  trained = loading.load(str(trained_autoencoder))
  mean, _ = trained.model.apply({"params": trained.params}, scope["tokens"], method="encode")
  agree(scope["mean"], mean, 1e-5)
  assert not (tmp_path / "out/next_patch.onnx").exists()


def test_a_diffusion_head_is_refused(words, tmp_path):
  source = str(GOLDEN / "k2_gqa/diffusion")
  conversion.convert(source, str(tmp_path / "in"), "workdir", tokenizer=words(97))
  with pytest.raises(errors.CalmError, match=r"not for diffusion heads.*--format=stablehlo"):
    conversion.convert(str(tmp_path / "in"), str(tmp_path / "out"), "onnx")


def test_a_missing_package_is_reported(trained_autoencoder, tmp_path, monkeypatch):
  find = to_onnx.importlib.util.find_spec
  monkeypatch.setattr(
    to_onnx.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
  )
  with pytest.raises(errors.CalmError, match=r"needs onnxscript: pip install -e '\.\[onnx\]'"):
    conversion.convert(str(trained_autoencoder), str(tmp_path / "out"), "onnx")
  assert not list(tmp_path.iterdir())
