"""Claims about the benchmark's PyTorch: from the same weights it computes the same losses."""

from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import config
from calm_jax.benchmarking import contenders, ours
from calm_jax.interchange import names

torch = pytest.importorskip("torch", reason="the peers are PyTorch's")
peers = pytest.importorskip("calm_jax.benchmarking.peers")

VOCAB = 50
SIZES: dict[str, Any] = dict(layers=2, width=32, ffn=48, heads=4, kv_heads=2)
CODEC = config.Autoencoder(width=16, ffn=24, latent=8, init="fan_in")
SETTINGS: dict[str, Any] = dict(
  data=config.Data(context=256),
  training=config.Training(batch=4, compute_dtype="float32"),
  mesh=config.Mesh(fsdp=1),
)
CALM = config.CalmRun(
  model=config.Backbone(**SIZES, init="fan_in"), head=config.Head(blocks=2, noise=8),
  loss=config.CalmLoss(samples=32, posterior_draws=32), **SETTINGS,
)  # fmt: skip
AUTOENCODER = config.AutoencoderRun(
  model=CODEC, loss=config.AutoencodingLoss(drop_token=0.0, drop_latent=0.0), **SETTINGS
)
BASELINE = config.TransformerRun(model=config.Transformer(**SIZES), **SETTINGS)


def loaded(module: Any, params: Any, table: list[names.Tensor], prefix: str = "") -> None:
  found = {t.name: torch.tensor(np.array(t.make())) for t in names.outgoing(params, table)}
  module.load_state_dict({f"{prefix}{name}": value for name, value in found.items()}, strict=False)
  assert {f"{prefix}{name}" for name in found} <= set(module.state_dict())


@pytest.mark.parametrize(
  ("run", "error"), [(AUTOENCODER, 1e-4), (CALM, 0.01), (BASELINE, 1e-5)],
  ids=["autoencoder", "calm", "transformer"],
)  # fmt: skip
def test_the_peers_loss_is_ours(run: config.Run, error: float):
  """To within the noise of 256 patches where samples and targets are drawn."""
  job = contenders.Job("toy", run, CODEC, VOCAB)
  stage = ours.stage_of(job)
  params = stage.init(jax.random.key(0))
  token_BS = np.random.default_rng(0).integers(0, VOCAB, (4, 256))
  model = peers.MODELS[run.stage](job).eval()
  if isinstance(run, config.AutoencoderRun):
    # A posterior of no width: nothing is drawn.
    posterior = params["encoder"]["posterior"]
    posterior["kernel"] = posterior["kernel"].at[:, CODEC.latent :].set(0.0)
    posterior["bias"] = posterior["bias"].at[CODEC.latent :].set(-20.0)
    loaded(model, params, names.autoencoder(CODEC, "ae_model."))
  elif isinstance(run, config.TransformerRun):
    loaded(model.llama, params, names.transformer(run.model))
  else:
    # A head that draws something: initial ones give zeros.
    params["head"]["out"]["kernel"] += 0.3 * jax.random.normal(jax.random.key(2), (32, 8))
    loaded(model, params, names.calm(run.model, run.head))
    loaded(model, stage.frozen, names.autoencoder(CODEC, "ae_model."))
  batch = {"tokens": jnp.array(token_BS, jnp.int32), "index": jnp.arange(4)}
  expected, _ = jax.jit(stage.loss)(params, stage.frozen, batch, jax.random.key(1))
  with torch.no_grad():
    found = model(torch.tensor(token_BS))
  np.testing.assert_allclose(float(found), float(expected), rtol=error)


def test_a_step_lowers_the_loss_of_its_batch():
  steps = peers.Steps(contenders.Job("toy", BASELINE, CODEC, VOCAB), compiled=False)
  with torch.no_grad():
    before = float(steps._loss(steps._tokens))
  assert len(contenders.taken(steps, 5)) == 5
  with torch.no_grad():
    assert float(steps._loss(steps._tokens)) < before - 0.01
