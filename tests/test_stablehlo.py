"""Claims about compiled artefacts: without this package they compute the same numbers."""

import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from folders import GOLDEN, agree, require_temperature_input, set_config

from calm_jax.interchange import tensors
from calm_jax.models import memory
from calm_jax.running import conversion, loading

COMPARE = """
import sys
import numpy as np
tokens = np.load("tokens.npy")
noise = np.load("noise.npy")
{code}
found = dict(mean=mean, log_std=log_std, logits=logits)
if "candidates" in dir():
  found |= dict(candidates=candidates, latents=latents)
  for tokens in np.load("more.npy"):
    candidates, latents, state = next_patch(weights, state, tokens, noise)
  found |= dict(last=latents)
np.savez("found.npz", **found)
assert not [name for name in sys.modules if name.startswith("calm_jax")]
"""


@pytest.mark.parametrize("model", ["autoencoder", "energy", "flow", "diffusion"])
def test_compiled_artefacts_compute_the_same_without_this_package(model, words, tmp_path):
  """Runs the code of the folder's own card, with batch 3 and 2 candidates."""
  shutil.copytree(GOLDEN / "k4" / model, tmp_path / "source")
  set_config(tmp_path / "source", max_position_embeddings=4)  # The model sees 3 patches.
  conversion.convert(
    str(tmp_path / "source"), str(tmp_path / "in"), "workdir", tokenizer=words(101)
  )
  conversion.convert(str(tmp_path / "in"), str(tmp_path / "out"), "stablehlo")
  trained = loading.load(str(tmp_path / "in"))
  rng = np.random.default_rng(0)
  token_BK = rng.integers(0, 101, (3, 4)).astype(np.int32)
  noise = np.zeros(())
  if model != "autoencoder":
    noise = np.asarray(trained.model.head.draw_noise(jax.random.key(1), (2, 3)))
  np.save(tmp_path / "tokens.npy", token_BK)
  np.save(tmp_path / "noise.npy", noise)
  more_PBK = rng.integers(0, 101, (6, 3, 4)).astype(np.int32)
  np.save(tmp_path / "more.npy", more_PBK)
  code = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
  script = COMPARE.format(code=code.replace("FOLDER", str(tmp_path / "out")))
  subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)
  outputs = np.load(tmp_path / "found.npz")

  autoencoder = trained.parents.get("autoencoder", trained)
  module, params = autoencoder.model, {"params": autoencoder.params}
  mean, log_std = module.apply(params, token_BK, method="encode")
  np.testing.assert_allclose(outputs["mean"], mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(outputs["log_std"], log_std, rtol=1e-5, atol=1e-6)
  logits = module.apply(params, mean, method="decode")
  np.testing.assert_allclose(outputs["logits"], logits, rtol=1e-5, atol=1e-5)
  if model != "autoencoder":
    hidden_B1D, _ = trained.model.hidden(trained.params, token_BK[:, None])
    sample_NBZ = trained.model.samples(trained.params, hidden_B1D[:, 0], noise)
    np.testing.assert_allclose(outputs["latents"], sample_NBZ, rtol=1e-4, atol=1e-5)
    assert outputs["candidates"].shape == (2, 3, 4)
    cache = memory.Cache.empty(3)
    for patch_BK in (token_BK, *more_PBK):
      hidden_B1D, cache = trained.model.hidden(trained.params, patch_BK[:, None], None, cache)
    sample_NBZ = trained.model.samples(trained.params, hidden_B1D[:, 0], noise)
    np.testing.assert_allclose(outputs["last"], sample_NBZ, rtol=1e-4, atol=1e-5)


def test_the_artefact_of_a_tempered_head_reads_the_temperature(other_tempered, tmp_path):
  require_temperature_input(other_tempered("diffusion", "both"), tmp_path / "out", "stablehlo")


@pytest.mark.parametrize("kind", ["continuous", "both"])
def test_the_artefacts_read_latents_as_input(kind, latent_reader, monkeypatch, tmp_path):
  """Runs the code of the folder's own card, with weights in shards."""
  source = latent_reader(kind)
  monkeypatch.setattr(tensors, "SHARD_BYTES", 20_000)
  conversion.convert(source, str(tmp_path / "out"), "stablehlo")
  here = loading.load(source)
  token_BK = np.random.default_rng(0).integers(0, 300, (3, 4)).astype(np.int32)
  noise = np.array(here.model.head.draw_noise(jax.random.key(0), (2, 3)))
  code = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
  scope = {"tokens": token_BK, "noise": noise}
  exec(code.replace("FOLDER", str(tmp_path / "out")), scope)
  parent = here.parents["autoencoder"]
  mean, _ = parent.model.apply({"params": parent.params}, token_BK, method="encode")
  hidden_B1D, _ = here.model.hidden(here.params, token_BK[:, None], mean[:, None])
  agree(scope["latents"], here.model.samples(here.params, hidden_B1D[:, 0], noise))
