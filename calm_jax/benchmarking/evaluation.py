"""BrierLM below four tokens a patch: branches from all positions against a pass for each."""

import dataclasses
import importlib.util
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax import config
from calm_jax.benchmarking import contenders, timing
from calm_jax.models import autoencoder, calm, memory
from calm_jax.objectives import brier
from calm_jax.training import calm_stage

REPETITIONS = 5
BLOCKS, PATCHES = 4, 256
VOCAB = 8192
RUN = config.CalmRun(
  model=config.Backbone(layers=4, width=256, ffn=688, heads=4, kv_heads=4, init="fan_in"),
  head=config.Head(blocks=2),
  loss=config.CalmLoss(samples=8, posterior_draws=1),
  training=config.Training(compute_dtype="float32"),
)


def _run(patch_size: int) -> config.CalmRun:
  sizes = dataclasses.replace(RUN.model, patch_size=patch_size)
  return dataclasses.replace(RUN, model=sizes, data=config.Data(context=PATCHES * patch_size))


def _codec(patch_size: int) -> tuple[autoencoder.Autoencoder, config.Autoencoder]:
  sizes = config.Autoencoder(
    patch_size=patch_size, width=256, ffn=512, latent=32 * patch_size, init="fan_in"
  )
  return autoencoder.Autoencoder(sizes, VOCAB), sizes


def _compare(patch_size: int) -> dict[str, Any]:
  codec, _ = _codec(patch_size)
  frozen = jax.jit(codec.initial)(jax.random.key(0))
  model = calm.Calm.build(_run(patch_size), codec, VOCAB)
  params = jax.jit(model.init)(jax.random.key(1))
  shape = (BLOCKS, PATCHES, patch_size)
  token_BPK = jax.random.randint(jax.random.key(2), shape, 0, VOCAB, jnp.int32)
  spanned, read = brier.patches_spanned(patch_size), PATCHES - 1
  starts = read - spanned + 1

  @jax.jit
  def branching(params, token_BPK):
    """Hidden states that follow each position's own continuation, all positions at once."""
    cache = memory.Cache.empty(read)
    _, cache = model.hidden(params, token_BPK[:, :-1], None, cache)
    assert isinstance(cache, memory.Cache)
    known = memory.Branches.of(cache, starts)
    found = []
    for step in range(spanned - 1):
      path_BPK = jnp.flip(token_BPK, axis=1)[:, step : step + starts]
      hidden_BPD, known = model.hidden(params, path_BPK, None, known)
      found.append(hidden_BPD)
    return jnp.stack(found)

  @jax.jit
  def one_pass(params, token_BPK, start, step):
    """The same of one position, by a pass over its text and continuation."""
    path_BPK = jnp.flip(token_BPK, axis=1)
    for done in range(spanned - 1):
      own_B1K = jax.lax.dynamic_slice_in_dim(path_BPK, start + done, 1, axis=1)
      changed = jax.lax.dynamic_update_slice_in_dim(token_BPK, own_B1K, start + 1 + done, axis=1)
      token_BPK = jnp.where(done <= step, changed, token_BPK)
    hidden_BPD, _ = model.hidden(params, token_BPK[:, :-1])
    return jnp.take(hidden_BPD, start + 1 + step, axis=1)

  def passes(positions):
    return [one_pass(params, token_BPK, i, step) for i in positions for step in range(spanned - 1)]

  every = np.asarray(branching(params, token_BPK))
  some = range(0, starts, starts // 8)
  single = np.asarray(jnp.stack(passes(some))).reshape(len(some), spanned - 1, BLOCKS, -1)
  difference = np.abs(np.moveaxis(every[:, :, list(some)], 2, 0) - single).max()

  stage = calm_stage.build(_run(patch_size), codec, frozen, VOCAB)
  batch = {"tokens": token_BPK.reshape(BLOCKS, -1), "index": jnp.arange(BLOCKS)}
  evaluate, key = jax.jit(stage.evaluate), jax.random.key(3)
  return {
    "patch_size": patch_size,
    "blocks": BLOCKS,
    "patches": PATCHES,
    "branches_seconds": timing.median_seconds(lambda: branching(params, token_BPK), REPETITIONS),
    "passes_seconds": timing.median_seconds(lambda: passes(range(starts)), 1),
    "largest_difference": float(difference),
    "evaluate_seconds": timing.median_seconds(
      lambda: evaluate(params, frozen, batch, key), REPETITIONS
    ),
  }


def _against_torch(patch_size: int) -> dict[str, Any]:
  """Returns seconds of scoring BLOCKS with two samples a patch, by ours and as published."""
  from calm_jax.benchmarking import peers  # Here: without PyTorch this module is needed too.

  run = dataclasses.replace(_run(patch_size), loss=dataclasses.replace(RUN.loss, samples=2))
  codec, sizes = _codec(patch_size)
  frozen = jax.jit(codec.initial)(jax.random.key(0))
  stage = calm_stage.build(run, codec, frozen, VOCAB)
  params = jax.jit(stage.init)(jax.random.key(1))
  shape = (BLOCKS, PATCHES, patch_size)
  token_BPK = np.asarray(jax.random.randint(jax.random.key(2), shape, 0, VOCAB, jnp.int32))
  batch = {"tokens": token_BPK.reshape(BLOCKS, -1), "index": jnp.arange(BLOCKS)}
  evaluate, key = jax.jit(stage.evaluate), jax.random.key(3)
  seconds = timing.median_seconds(lambda: evaluate(params, frozen, batch, key), REPETITIONS)
  theirs = peers.evaluation(contenders.Job("", run, sizes, VOCAB), token_BPK)
  repetitions = REPETITIONS if patch_size >= 4 else 1
  return {
    "patch_size": patch_size, "evaluate_seconds": seconds,
    "pytorch_seconds": timing.median_seconds(theirs, repetitions),
  }  # fmt: skip


def measure() -> tuple[list[str], list[dict[str, Any]]]:
  """Returns lines to be read, and the figures: seconds are medians, lower is better."""
  lines, figures = [], []
  for patch_size in (1, 2):
    found = _compare(patch_size)
    found["speedup"] = found["passes_seconds"] / found["branches_seconds"]
    lines.append(
      f"K = {patch_size}: {found['blocks']} blocks of {found['patches']} patches: branches "
      f"{found['branches_seconds']:.3f} s, a pass a position {found['passes_seconds']:.1f} s: "
      f"{found['speedup']:.0f} times; whole evaluation {found['evaluate_seconds']:.2f} s; hidden "
      f"states differ by at most {found['largest_difference']:.1e}"
    )
    figures.append(found)
  if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
    return [*lines, "PyTorch: not installed: torch, transformers"], figures
  for patch_size in (4, 2):
    found = _against_torch(patch_size)
    ours, theirs = found["evaluate_seconds"], found["pytorch_seconds"]
    lines.append(
      f"K = {patch_size}, two samples a patch: whole evaluation {ours:.3f} s, as published in "
      f"PyTorch {theirs:.2f} s: {theirs / ours:.1f} times"
    )
    figures.append(found)
  return lines, figures
