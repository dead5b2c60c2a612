"""BrierLM at K < 4: branches from all positions at once, or a pass per position."""

import dataclasses
import importlib.util
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from benchmarks import jobs, timing
from calm_jax import config
from calm_jax.models import memory
from calm_jax.objectives import brier
from calm_jax.running import evaluating, untrained
from calm_jax.stages import autoencoder as autoencoder_stage
from calm_jax.stages import calm as calm_stage
from calm_jax.training import trained as trained_lib

REPETITIONS = 5
BLOCKS, PATCHES = 4, 256
VOCAB = 8192
RUN = calm_stage.Run(
  model=config.Backbone(layers=4, width=256, ffn=688, heads=4, kv_heads=4, init="fan_in"),
  head=config.Head(blocks=2),
  loss=config.CalmLoss(samples=8, posterior_draws=1),
  training=config.Training(compute_dtype="float32"),
)


def _run(patch_size: int) -> calm_stage.Run:
  """Returns RUN with another patch size."""
  sizes = dataclasses.replace(RUN.model, patch_size=patch_size)
  return dataclasses.replace(RUN, model=sizes, data=config.Data(context=PATCHES * patch_size))


def _parents(patch_size: int) -> dict[str, autoencoder_stage.Run]:
  sizes = config.Autoencoder(
    patch_size=patch_size, width=256, ffn=512, latent=32 * patch_size, init="fan_in"
  )
  return {"autoencoder": autoencoder_stage.Run(model=sizes)}


def _untrained(run: calm_stage.Run) -> trained_lib.Trained:
  """Returns a language model of initial values over an autoencoder of initial values."""
  parents = _parents(run.model.patch_size)
  return untrained.trained(run, parents, VOCAB, lambda initial: jax.jit(initial)(jax.random.key(1)))


def _compare(patch_size: int) -> dict[str, Any]:
  """Returns seconds of both ways, and how far their hidden states differ."""
  trained = _untrained(_run(patch_size))
  model, params = trained.model, trained.params
  shape = (BLOCKS, PATCHES, patch_size)
  token_BPK = jax.random.randint(jax.random.key(2), shape, 0, VOCAB, jnp.int32)
  spanned, read = brier.patches_spanned(patch_size), PATCHES - 1
  starts = read - spanned + 1

  @jax.jit
  def branching(params, token_BPK):
    """Returns the hidden states after each position's continuation, all positions at once."""
    cache = memory.Cache.empty(read)
    _, cache = model.hidden(params, token_BPK[:, :-1], None, cache)
    assert isinstance(cache, memory.Cache)
    branches = memory.Branches.of(cache, starts)
    hiddens = []
    for step in range(spanned - 1):
      path_BPK = jnp.flip(token_BPK, axis=1)[:, step : step + starts]
      hidden_BPD, branches = model.hidden(params, path_BPK, None, branches)
      hiddens.append(hidden_BPD)
    return jnp.stack(hiddens)

  @jax.jit
  def one_pass(params, token_BPK, start, step):
    """Returns one position's hidden states, by a pass over its text and continuation."""
    path_BPK = jnp.flip(token_BPK, axis=1)
    for index in range(spanned - 1):
      own_B1K = jax.lax.dynamic_slice_in_dim(path_BPK, start + index, 1, axis=1)
      changed = jax.lax.dynamic_update_slice_in_dim(token_BPK, own_B1K, start + 1 + index, axis=1)
      token_BPK = jnp.where(index <= step, changed, token_BPK)
    hidden_BPD, _ = model.hidden(params, token_BPK[:, :-1])
    return jnp.take(hidden_BPD, start + 1 + step, axis=1)

  def passes(positions):
    return [one_pass(params, token_BPK, i, step) for i in positions for step in range(spanned - 1)]

  branch_hidden = np.asarray(branching(params, token_BPK))
  subset = range(0, starts, starts // 8)
  pass_hidden = np.asarray(jnp.stack(passes(subset))).reshape(len(subset), spanned - 1, BLOCKS, -1)
  difference = np.abs(np.moveaxis(branch_hidden[:, :, list(subset)], 2, 0) - pass_hidden).max()

  stage, _ = evaluating.functions(trained)
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
      lambda: evaluate(params, stage.frozen, batch, key), REPETITIONS
    ),
  }


def _against_torch(patch_size: int) -> dict[str, Any]:
  """Returns seconds of scoring BLOCKS with two samples per patch: ours, and PyTorch's."""
  from benchmarks.peers import calm as peer  # Not at the top: PyTorch may not be installed.

  run = dataclasses.replace(_run(patch_size), loss=dataclasses.replace(RUN.loss, samples=2))
  trained = _untrained(run)
  (stage, _), params = evaluating.functions(trained), trained.params
  shape = (BLOCKS, PATCHES, patch_size)
  token_BPK = np.asarray(jax.random.randint(jax.random.key(2), shape, 0, VOCAB, jnp.int32))
  batch = {"tokens": token_BPK.reshape(BLOCKS, -1), "index": jnp.arange(BLOCKS)}
  evaluate, key = jax.jit(stage.evaluate), jax.random.key(3)
  seconds = timing.median_seconds(lambda: evaluate(params, stage.frozen, batch, key), REPETITIONS)
  theirs = peer.evaluation(jobs.BenchmarkJob("", run, _parents(patch_size), VOCAB), token_BPK)
  repetitions = REPETITIONS if patch_size >= 4 else 1
  return {
    "patch_size": patch_size,
    "evaluate_seconds": seconds,
    "pytorch_seconds": timing.median_seconds(theirs, repetitions),
  }


def measure() -> tuple[list[str], list[dict[str, Any]]]:
  """Returns lines to print, and the figures: median seconds, lower is better."""
  lines, figures = [], []
  for patch_size in (1, 2):
    row = _compare(patch_size)
    row["speedup"] = row["passes_seconds"] / row["branches_seconds"]
    lines.append(
      f"K = {patch_size}: {row['blocks']} blocks of {row['patches']} patches: branches "
      f"{row['branches_seconds']:.3f} s, a pass a position {row['passes_seconds']:.1f} s: "
      f"{row['speedup']:.0f} times; whole evaluation {row['evaluate_seconds']:.2f} s; hidden "
      f"states differ by at most {row['largest_difference']:.1e}"
    )
    figures.append(row)
  if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
    return [*lines, "PyTorch: not installed: torch, transformers"], figures
  for patch_size in (4, 2):
    row = _against_torch(patch_size)
    ours, theirs = row["evaluate_seconds"], row["pytorch_seconds"]
    lines.append(
      f"K = {patch_size}, two samples a patch: whole evaluation {ours:.3f} s, as published in "
      f"PyTorch {theirs:.2f} s: {theirs / ours:.1f} times"
    )
    figures.append(row)
  return lines, figures
