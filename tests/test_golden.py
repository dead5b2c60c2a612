"""Claims about the published method: we compute the numbers of the reference implementation.

testdata/golden holds what the PyTorch reference computed in float32 for two tiny models with
random weights; its README describes each tensor.
"""

import json
import pathlib

import numpy as np
import pytest
from folders import GOLDEN, agree
from jax import numpy as jnp
from safetensors import numpy as safetensors

from calm_jax.interchange import reading
from calm_jax.kernels import cross_entropy
from calm_jax.models import autoencoder, calm, layers, transformer
from calm_jax.objectives import autoencoding, diffusion, energy_score, flow_matching


@pytest.fixture(scope="module", params=["k4", "k2_gqa"])
def case(request: pytest.FixtureRequest) -> pathlib.Path:
  return GOLDEN / request.param


@pytest.fixture(scope="module")
def vectors(case: pathlib.Path):
  return safetensors.load_file(case / "vectors.safetensors")


@pytest.fixture(scope="module")
def imported_autoencoder(case: pathlib.Path):
  imported = reading.read(case / "autoencoder")
  return autoencoder.Autoencoder(imported.sizes, imported.vocab_size), imported.params


def imported_calm(folder: pathlib.Path):
  imported = reading.read(folder)
  assert imported.stage == "calm"
  sizes, head = imported.sizes, imported.settings["head"]
  return calm.Calm.build(
    sizes, head, imported.parents["autoencoder"].sizes, imported.vocab_size
  ), imported


def inner_autoencoder(imported: reading.Imported):
  inner = imported.parents["autoencoder"]
  return autoencoder.Autoencoder(inner.sizes, inner.vocab_size), inner.params


def by_patch(token_BS: np.ndarray, case: pathlib.Path) -> np.ndarray:
  size = json.loads((case / "case.json").read_text())["patch"]
  return token_BS.reshape(len(token_BS), -1, size)


def test_posteriors_and_logits_of_the_autoencoder_equal_the_reference(
  imported_autoencoder, vectors, case
):
  model, params = imported_autoencoder
  token_BPK = by_patch(vectors["ae.input_ids"], case)
  mean_BPZ, log_std_BPZ = layers.apply(model, params, token_BPK, method="encode")
  agree(mean_BPZ, vectors["ae.mean"])
  agree(log_std_BPZ, vectors["ae.log_std"])
  logits_BPKV = layers.apply(model, params, vectors["ae.latent"], method="decode")
  agree(logits_BPKV.reshape(vectors["ae.logits"].shape), vectors["ae.logits"])


def test_the_loss_of_the_autoencoder_equals_the_reference(imported_autoencoder, vectors, case):
  model, params = imported_autoencoder
  token_BPK = by_patch(vectors["ae.input_ids"], case)
  mean_BPZ, log_std_BPZ = layers.apply(model, params, token_BPK, method="encode")
  z_BPZ = mean_BPZ + jnp.exp(log_std_BPZ) * vectors["ae.eps"]
  feature_BPKE = layers.apply(model, params, z_BPZ, method="features")
  weight_BPK = jnp.full(token_BPK.shape, 1 / token_BPK.size)
  flat = (x.reshape(len(x), -1, *x.shape[3:]) for x in (feature_BPKE, token_BPK, weight_BPK))
  nats = cross_entropy.scores(params["embed"]["embedding"], *flat).loss
  kl = jnp.mean(autoencoding.floored_kl(mean_BPZ, log_std_BPZ, 0.5))
  agree(nats[None], vectors["ae.ce_per_token"])
  agree(kl[None], vectors["ae.kl_clamped"])
  loss = token_BPK.shape[-1] * nats + 1e-3 * kl
  agree(loss[None], vectors["ae.train_loss_no_dropout"])


@pytest.mark.parametrize("head", ["energy", "flow", "diffusion"])
def test_inputs_and_hidden_states_of_the_backbone_equal_the_reference(head: str, vectors, case):
  model, imported = imported_calm(case / head)
  token_BPK = by_patch(vectors["lm.input_ids"], case)[:, :-1]
  module = model.backbone
  (_, _), state = module.apply(
    {"params": imported.params["backbone"]}, token_BPK, capture_intermediates=True
  )
  embeds_BPD = state["intermediates"]["input"]["__call__"][0]
  agree(embeds_BPD, vectors[f"{head}.patch_embeds"])
  agree(model.hidden(imported.params, token_BPK)[0], vectors[f"{head}.hidden"])


def test_samples_of_the_energy_head_equal_the_reference(vectors, case):
  model, imported = imported_calm(case / "energy")
  sample_NBPZ = model.samples(imported.params, vectors["energy.hidden"], vectors["energy.noise"])
  agree(sample_NBPZ, vectors["energy.samples"])
  token_NBPK = calm.decode_tokens(*inner_autoencoder(imported), sample_NBPZ[:2])
  for n, token_BPK in enumerate(token_NBPK, start=1):
    np.testing.assert_array_equal(token_BPK, vectors[f"energy.tokens_{n}"])


def test_posteriors_of_the_frozen_autoencoder_equal_the_reference(vectors, case):
  _, imported = imported_calm(case / "energy")
  token_BPK = by_patch(vectors["lm.input_ids"], case)[:, 1:]
  mean_BPZ, log_std_BPZ = layers.apply(*inner_autoencoder(imported), token_BPK, method="encode")
  agree(mean_BPZ, vectors["energy.target_mean"])
  agree(log_std_BPZ, vectors["energy.target_log_std"])


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_the_energy_loss_equals_the_reference(alpha: float, vectors):
  std_BPZ = np.exp(vectors["energy.target_log_std"])
  offset_MBPZ = jnp.array(std_BPZ * vectors["energy.target_eps"])
  sample_NBPZ = jnp.array(vectors["energy.samples"])
  attraction_BP = energy_score.attraction(
    sample_NBPZ, vectors["energy.target_mean"], lambda m: offset_MBPZ[m], len(offset_MBPZ), alpha
  )
  loss_BP, _ = energy_score.energy_loss(sample_NBPZ, attraction_BP, alpha)
  agree(loss_BP, vectors[f"energy.loss_beta{alpha}"])


def rows(hidden_BPD: np.ndarray) -> np.ndarray:
  return hidden_BPD.reshape(-1, hidden_BPD.shape[-1])


def test_velocities_losses_and_samples_of_the_flow_head_equal_the_reference(vectors, case):
  model, imported = imported_calm(case / "flow")
  hidden_ND, start_1NZ = rows(vectors["flow.hidden"]), vectors["flow.x0"][None]
  t_1N, z_1NZ = jnp.array(vectors["flow.t"])[None], vectors["flow.target"][None]
  x_1NZ = flow_matching.between(t_1N, start_1NZ, z_1NZ)
  velocity_1NZ = model.head.velocity(imported.params["head"], x_1NZ, hidden_ND, t_1N)
  agree(velocity_1NZ[0], vectors["flow.velocity"])
  loss_1N = flow_matching.flow_matching_loss(velocity_1NZ, start_1NZ, z_1NZ)
  agree(loss_1N[0], vectors["flow.loss"])
  sample_1NZ = model.samples(imported.params, hidden_ND, start_1NZ)
  agree(sample_1NZ[0], vectors["flow.sample_midpoint20"])


def test_the_diffusion_schedule_equals_the_reference(vectors):
  alphas = diffusion.cosine_alphas_cumprod()
  np.testing.assert_allclose(alphas, vectors["diffusion.alphas_cumprod"], rtol=1e-12)


def test_the_diffusion_loss_equals_the_reference(vectors, case):
  model, imported = imported_calm(case / "diffusion")
  levels = diffusion.Levels.evenly(diffusion.LEVELS)
  hidden_ND, level_1N = rows(vectors["diffusion.hidden"]), jnp.array(vectors["diffusion.t"])[None]
  z_1NZ, noise_1NZ = vectors["diffusion.target"][None], vectors["diffusion.noise"][None]
  x_1NZ = diffusion.noised(levels, z_1NZ, level_1N, noise_1NZ)
  agree(x_1NZ[0], vectors["diffusion.x_t"])
  net_out = layers.apply(model.head.network, imported.params["head"], x_1NZ, hidden_ND, level_1N)
  agree(net_out[0], vectors["diffusion.net_out"])
  loss_mse = diffusion.mean_squared_error(net_out, noise_1NZ)
  agree(loss_mse[0], vectors["diffusion.loss_mse"])
  loss_vb = diffusion.variational_term(levels, net_out, z_1NZ, x_1NZ, level_1N)
  agree(loss_vb[0], vectors["diffusion.loss_vb"])
  agree((loss_mse + loss_vb)[0], vectors["diffusion.loss"])


def test_samples_of_the_diffusion_head_equal_the_reference(vectors, case):
  model, imported = imported_calm(case / "diffusion")
  noise_NTZ = np.moveaxis(vectors["diffusion.sample_noises"], 0, 1)
  sample_1NZ = model.samples(imported.params, rows(vectors["diffusion.hidden"]), noise_NTZ[None])
  agree(sample_1NZ[0], vectors["diffusion.sample100"], 1e-4)


def test_logits_of_the_baseline_equal_the_reference(vectors, case):
  imported = reading.read(case / "ar")
  assert imported.stage == "transformer"
  model = transformer.Transformer(imported.sizes, imported.vocab_size)
  agree(layers.apply(model, imported.params, vectors["lm.input_ids"]), vectors["ar.logits"])
