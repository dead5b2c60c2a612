"""Claims about layouts: every mesh of eight devices computes the same as one device."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest

from calm_jax import config
from calm_jax.data import pipeline
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.parallel import rules
from calm_jax.running import untrained
from calm_jax.stages import autoencoder as autoencoder_stage
from calm_jax.stages import calm as calm_stage
from calm_jax.stages import tempered as tempered_stage
from calm_jax.stages import transformer as transformer_stage
from calm_jax.training import program, step
from calm_jax.training import stage as stage_lib

STEPS, VOCAB = 5, 320
# Sizes that are divisible by eight.
SIZES = dict(layers=2, width=32, ffn=64, heads=8, kv_heads=8, init="fan_in")
AUTOENCODER = config.Autoencoder(width=32, ffn=64, latent=8, init="fan_in")
# Adam divides by the root mean square of gradients. Without a larger eps, rounding errors of a
# gradient near zero would become full steps.
OPTIMIZER = config.Optimizer(learning_rate=1e-2, warmup_steps=2, eps=1e-3)
TRAINING = config.Training(steps=STEPS, batch=16, compute_dtype="float32")
COMMON = dict(data=config.Data("", 32), optimizer=OPTIMIZER, training=TRAINING)

RUNS: dict[str, config.Run] = {
  "autoencoder": autoencoder_stage.Run(model=AUTOENCODER, **COMMON),
  "transformer": transformer_stage.Run(model=config.Transformer(**SIZES), **COMMON),
} | {
  kind: calm_stage.Run(
    model=config.Backbone(**SIZES, input="both"),
    head=config.Head(kind=kind, blocks=1, noise=8),
    loss=config.CalmLoss(samples=4, posterior_draws=8, token_weight=3.0, token_every=2),
    **COMMON,
  )
  for kind in ("energy", "flow", "diffusion")
}
RUNS["tempered"] = tempered_stage.Run(
  model=config.Backbone(**SIZES, input="both"),
  head=config.Head(blocks=1, noise=8),
  loss=tempered_stage.Loss(samples=4, every=2, races=2, num_candidates=6),
  **COMMON,
)

MESHES = [
  config.Mesh(*shape)
  for shape in itertools.product((1, 2, 4, 8), repeat=4)
  if math.prod(shape) == 8
]
# XLA's partitioner once computed a wrong loss for MISCOMPILED.
MISCOMPILED = ("autoencoder", config.Mesh(2, 2, 1, 2))


def by_default(i: int, j: int) -> bool:
  """Returns whether mesh j is tested with stage i; every pair is with `pytest -m exhaustive`.

  Each mesh is, with one stage. The tempered one comes last and takes long to compile: it is tested
  with two meshes more.
  """
  tempered = len(RUNS) - 1
  return j % 9 == 5 if i == tempered else (i + j) % tempered == 0


PAIRS = [
  pytest.param(
    name,
    mesh,
    id=f"{name}-" + "x".join(str(size) for size in dataclasses.astuple(mesh)),
    marks=[] if by_default(i, j) or (name, mesh) == MISCOMPILED else pytest.mark.exhaustive,
  )
  for i, name in enumerate(RUNS)
  for j, mesh in enumerate(MESHES)
]


def frozen_params(initial):
  """Returns parameters of a frozen parent. None is zero, so that the draws of a head differ."""
  params = jax.jit(initial)(jax.random.key(7))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(8), len(leaves))
  noisy = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(tree, noisy)


def built(run: config.Run) -> stage_lib.Stage:
  parents = {"autoencoder": autoencoder_stage.Run(model=AUTOENCODER), "calm": RUNS["energy"]}
  return untrained.functions(run, parents, VOCAB, frozen_params)


def batch(number: int, rows: np.ndarray) -> dict[str, np.ndarray]:
  generator = np.random.default_rng(number)
  token_BS = generator.integers(0, VOCAB, (TRAINING.batch, 32), dtype=np.int32)
  index_B = np.arange(number * TRAINING.batch, (number + 1) * TRAINING.batch, dtype=np.int32)
  return {"tokens": token_BS[rows], "index": index_B[rows]}


def trained(run: config.Run):
  """Returns the losses of STEPS steps on the run's mesh, and the final state on host and mesh."""
  mesh = mesh_lib.build(run.mesh)
  with jax.set_mesh(mesh):
    made = program.TrainProgram(run, built(run), mesh, pipeline.fields(32))
    state, take = made.initial(), made.compiled_step()
    frozen = jax.device_put(made.stage.frozen, jax.tree.map(lambda x: x.sharding, made.frozen))
    losses = []
    for number in range(STEPS):
      own = mesh_lib.own_rows(mesh, TRAINING.batch)
      placed = mesh_lib.place_rows(mesh, batch(number, own), own, TRAINING.batch)
      before = state
      state, figures = take(state, frozen, placed, made.place_signals())
      losses.append(float(figures["loss"]))
      assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
  return np.array(losses), jax.device_get(state), state


@pytest.fixture(scope="module")
def one_device():
  """Returns losses and final state on one device, computed once per stage."""
  results = {}

  def get(name: str):
    if name not in results:
      run = dataclasses.replace(RUNS[name], mesh=config.Mesh(fsdp=1))
      results[name] = trained(run)[:2]
    return results[name]

  return get


def assert_equal(name: str, run: config.Run, one_device) -> step.TrainState:
  losses, final, state = trained(run)
  expected_losses, expected = one_device(name)
  np.testing.assert_allclose(losses, expected_losses, rtol=2e-6)

  def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6)

  jax.tree.map(close, final.params, expected.params)
  errors = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected.params, final.params)
  assert max(jax.tree.leaves(errors)) < 1e-5
  return state


@pytest.mark.parametrize(("name", "mesh"), PAIRS)
def test_every_mesh_gives_the_losses_and_parameters_of_one_device(name, mesh, one_device):
  accumulation = 1 + MESHES.index(mesh) % 2
  training = dataclasses.replace(TRAINING, accumulation=accumulation)
  run = dataclasses.replace(RUNS[name], mesh=mesh, training=training)
  state = assert_equal(name, run, one_device)
  places = rules.shardings(state, mesh_lib.build(mesh))
  for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
    assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


@pytest.mark.parametrize(
  ("remat", "unroll"),
  [("none", True), ("dots", False), ("named", False), ("full", True), ("offload", False)],
)
def test_remat_and_unrolling_change_no_number(remat, unroll, one_device):
  execution = config.Execution(remat=remat, unroll=unroll)
  run = dataclasses.replace(RUNS["energy"], mesh=config.Mesh(fsdp=1), execution=execution)
  assert_equal("energy", run, one_device)
