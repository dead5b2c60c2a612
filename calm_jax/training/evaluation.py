"""Scores of a model on held-out blocks, for the loop and for the command alike."""

from typing import Any

import jax
import numpy as np

from calm_jax.data import pipeline
from calm_jax.data import store as store_lib
from calm_jax.training import stages


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
    self._stage = stage
    self._evaluate = jax.jit(stage.evaluate)
    self._heldout = (store, context, batch, limit)
    self._seed = seed

  def __call__(self, params: Any) -> dict[str, Any]:
    """Returns the stage's figures, with the context and the counts they rest on."""
    store, context, batch_size, limit = self._heldout
    key = jax.random.key(self._seed)
    parts = []
    for batch, rows in pipeline.heldout_batches(store, context, batch_size, limit):
      scores = jax.device_get(self._evaluate(params, self._stage.frozen, batch, key))
      parts.append(jax.tree.map(lambda x, rows=rows: x[:rows], scores))
    scores = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    blocks = len(next(iter(scores.values())))
    return self._stage.summarize(scores) | {
      "context_tokens": context,
      "blocks": blocks,
      "tokens": blocks * context,
      "seed": self._seed,
    }
