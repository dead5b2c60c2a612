"""Scores of a model on held-out blocks, for the loop and for the command alike."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from calm_jax import config, workdir
from calm_jax.data import pipeline
from calm_jax.data import store as store_lib
from calm_jax.objectives import brier
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.training import autoencoder_stage, calm_stage, stages, transformer_stage

Staged = tuple[stages.Stage, int, dict[str, Any]]


def _autoencoder(trained: workdir.TrainedAutoencoder, samples: int) -> Staged:
  stage = autoencoder_stage.build(trained.run, trained.origin.vocab_size)
  return stage, trained.run.model.patch_size, {}


def _calm(trained: workdir.TrainedCalm, samples: int) -> Staged:
  loss = trained.run.loss
  loss = dataclasses.replace(loss, samples=samples or loss.samples)
  run, codec = dataclasses.replace(trained.run, loss=loss), trained.model.autoencoder
  stage = calm_stage.build(run, codec, trained.autoencoder.params, trained.origin.vocab_size)
  conditions = {"samples": loss.samples, "posterior_draws": loss.posterior_draws}
  return stage, codec.sizes.patch_size, conditions


def _transformer(trained: workdir.TrainedTransformer, samples: int) -> Staged:
  return transformer_stage.build(trained.run, trained.origin.vocab_size), 1, {}


_STAGES: dict[str, Callable[..., Staged]] = {
  "autoencoder": _autoencoder,
  "calm": _calm,
  "transformer": _transformer,
}


def stage_of(trained: workdir.Trained, samples: int = 0) -> Staged:
  """Returns the stage of trained weights, its K, and what its figures depend on.

  Args:
    samples: N, samples a patch of stage two; 0 for as many as in training.
  """
  return _STAGES[trained.run.stage](trained, samples)


def require_context(context: int, patch_size: int, name: str) -> None:
  """Raises CalmError unless blocks of `context` tokens can be scored; `name` is the setting's."""
  fewest = patch_size * (brier.patches_spanned(patch_size) + 2)
  config.require(
    context % patch_size == 0 and context >= fewest,
    f"{name} must be a multiple of K = {patch_size} tokens and at least {fewest}, got {context}",
  )


class Evaluator:
  """Evaluates a stage on `limit` held-out blocks of a store, from all over it; 0 for all."""

  def __init__(
    self,
    stage: stages.Stage,
    store: store_lib.TokenStore,
    context: int,
    batch: int,
    limit: int,
    seed: int,
  ):
    """Takes what to evaluate. `batch` is rounded up to what the mesh divides evenly."""
    self._mesh = mesh_lib.current()
    parts = mesh_lib.row_parts(self._mesh)
    self._stage = stage
    everywhere = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
    self._evaluate = jax.jit(stage.evaluate, out_shardings=everywhere)
    self._heldout = (store, context, -(-batch // parts) * parts, limit)
    self._seed = seed

  def __call__(self, params: Any) -> dict[str, Any]:
    """Returns the stage's figures, with the context and the counts they rest on."""
    store, context, batch_size, limit = self._heldout
    key = jax.random.key(self._seed)
    own, parts = mesh_lib.own_rows(self._mesh, batch_size), []
    for batch, rows in pipeline.heldout_batches(store, context, batch_size, limit, own):
      batch = mesh_lib.place_rows(self._mesh, batch, own, batch_size)
      with jax.set_mesh(self._mesh):
        scores = self._evaluate(params, self._stage.frozen, batch, key)
      scores = jax.device_get(scores)
      parts.append(jax.tree.map(lambda x, rows=rows: x[:rows], scores))
    scores = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    blocks = len(next(iter(scores.values())))
    return self._stage.summarize(scores) | {
      "context_tokens": context,
      "blocks": blocks,
      "tokens": blocks * context,
      "seed": self._seed,
    }
