"""Claims about the benchmarks' PyTorch models: with equal weights they compute equal losses."""

import dataclasses
import pathlib
import pickle
import subprocess
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from benchmarks import contenders, jobs, ours
from calm_jax import config, errors
from calm_jax.interchange import names
from calm_jax.models import foreign
from calm_jax.stages import autoencoder as autoencoder_stage
from calm_jax.stages import calm as calm_stage
from calm_jax.stages import transformer as transformer_stage

torch = pytest.importorskip("torch", reason="the peers are PyTorch's")
pytorch = pytest.importorskip("benchmarks.pytorch")

ROOT = pathlib.Path(__file__).parent.parent
VOCAB = 50
SIZES: dict[str, Any] = dict(layers=2, width=32, ffn=48, heads=4, kv_heads=2)
AUTOENCODER = config.Autoencoder(width=16, ffn=24, latent=8, init="fan_in")
SETTINGS: dict[str, Any] = dict(
  data=config.Data(context=256),
  training=config.Training(batch=4, compute_dtype="float32"),
  mesh=config.Mesh(fsdp=1),
)
CALM = calm_stage.Run(
  model=config.Backbone(**SIZES, init="fan_in"),
  head=config.Head(blocks=2, noise=8),
  loss=config.CalmLoss(samples=32, posterior_draws=32),
  **SETTINGS,
)
STAGE_ONE = autoencoder_stage.Run(
  model=AUTOENCODER, loss=config.AutoencodingLoss(drop_token=0.0, drop_latent=0.0), **SETTINGS
)
PARENTS = {"autoencoder": STAGE_ONE}
BASELINE = transformer_stage.Run(model=config.Transformer(**SIZES), **SETTINGS)


def load(module: Any, params: Any, table: list[foreign.Tensor]) -> None:
  """Puts our parameters into a PyTorch module."""
  tensors = {t.name: torch.tensor(np.array(t.make())) for t in names.outgoing(params, table)}
  module.load_state_dict(tensors, strict=False)
  assert set(tensors) <= set(module.state_dict())


@pytest.mark.parametrize(
  ("run", "error"),
  [(STAGE_ONE, 1e-4), (CALM, 0.01), (BASELINE, 1e-5)],
  ids=["autoencoder", "calm", "transformer"],
)
def test_the_peers_loss_is_ours(run: config.Run, error: float):
  """To within the noise of 256 patches where samples and targets are drawn."""
  torch.manual_seed(0)
  job = jobs.BenchmarkJob("toy", run, PARENTS, VOCAB)
  stage = ours.stage_of(job)
  params = stage.init(jax.random.key(0))
  token_BS = np.random.default_rng(0).integers(0, VOCAB, (4, 256))
  model = pytorch.model(job).eval()
  if isinstance(run, autoencoder_stage.Run):
    # The posterior's std is 0, so nothing is random.
    posterior = params["encoder"]["posterior"]
    posterior["kernel"] = posterior["kernel"].at[:, AUTOENCODER.latent :].set(0.0)
    posterior["bias"] = posterior["bias"].at[AUTOENCODER.latent :].set(-20.0)
    load(model, params, names.autoencoder(AUTOENCODER, "ae_model."))
  elif isinstance(run, transformer_stage.Run):
    load(model.llama, params, names.transformer(run.model))
  else:
    # An initial head writes zeros only.
    params["head"]["out"]["kernel"] += 0.3 * jax.random.normal(jax.random.key(2), (32, 8))
    load(model, params, names.calm(run.model, run.head))
    load(model, stage.frozen, names.autoencoder(AUTOENCODER, "ae_model."))
  batch = {"tokens": jnp.array(token_BS, jnp.int32), "index": jnp.arange(4)}
  expected, _ = jax.jit(stage.loss)(params, stage.frozen, batch, jax.random.key(1))
  with torch.no_grad():
    loss = model(torch.tensor(token_BS))
  np.testing.assert_allclose(float(loss), float(expected), rtol=error)


def test_a_stage_without_a_pytorch_model_is_named():
  job = jobs.BenchmarkJob("toy", BASELINE, {}, VOCAB)
  other: Any = types.SimpleNamespace(stage="other")
  with pytest.raises(errors.CalmError, match=r"no PyTorch model of stage 'other': .*other\.py"):
    pytorch.model(dataclasses.replace(job, run=other))


def test_the_process_of_pytorch_does_not_import_jax():
  """Also not by the act, which a spawned process imports as its main module."""
  code = (
    "import pickle, runpy, sys; runpy.run_module('calm_jax.benchmark', run_name='__mp_main__');"
    "from benchmarks import contenders; job = pickle.load(sys.stdin.buffer);"
    "contenders._torch(job); print('torch' in sys.modules, 'jax' in sys.modules)"
  )
  llama = config.Transformer(layers=1, width=16, ffn=32, heads=2, kv_heads=2)
  run = transformer_stage.Run(model=llama, data=config.Data(context=16))
  sent = pickle.dumps(jobs.BenchmarkJob("toy", run, {}, 64).plain())
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, cwd=ROOT, input=sent, capture_output=True, check=True)
  assert done.stdout == b"True False\n"


def test_a_step_lowers_the_loss_of_its_batch():
  steps = pytorch.Steps(jobs.BenchmarkJob("toy", BASELINE, {}, VOCAB), compiled=False)
  with torch.no_grad():
    before = float(steps._loss(steps._tokens))
  assert len(contenders.step_seconds(steps, 5)) == 5
  with torch.no_grad():
    assert float(steps._loss(steps._tokens)) < before - 0.01
