"""A stage and held-out blocks -> its figures, for the training loop and for evaluate."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from calm_jax import config
from calm_jax.data import pipeline
from calm_jax.data import store as store_lib
from calm_jax.objectives import brier
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.training import feed
from calm_jax.training import stage as stage_lib


def require_context(context: int, patch_size: int, name: str) -> None:
  """Raises CalmError, naming the setting, unless blocks of `context` tokens can be scored."""
  fewest = patch_size * (brier.patches_spanned(patch_size) + 2)
  config.require(
    context % patch_size == 0 and context >= fewest,
    f"{name} must be a multiple of K = {patch_size} tokens and at least {fewest}, got {context}",
  )


class Evaluator:
  """Evaluates a stage on held-out blocks of a token store."""

  def __init__(
    self,
    stage: stage_lib.Stage,
    store: store_lib.TokenStore | None,
    context: int,
    batch: int,
    limit: int,
    seed: int,
  ):
    """Prepares the evaluation of `stage`; nothing is compiled yet.

    Args:
      store: the token store; None to compile only.
      context: tokens per block.
      batch: blocks scored at once, rounded up to a multiple that the mesh divides evenly.
      limit: number of blocks, spread evenly over the held-out text; 0 for all.
      seed: seed of all noise.
    """
    self._mesh = mesh_lib.current()
    parts = mesh_lib.row_parts(self._mesh)
    self._stage = stage
    self._heldout = (store, context, -(-batch // parts) * parts, limit)
    self._seed = seed
    self._compiled: jax.stages.Compiled | None = None

  @property
  def rows(self) -> int:
    """Number of examples in a batch."""
    return self._heldout[2]

  def _key(self) -> jax.Array:
    return jax.random.key(self._seed)

  def lowered(self, params: Any, frozen: Any) -> jax.stages.Lowered:
    """Returns the program that scores a batch, lowered for abstract trees but not compiled."""
    batch = feed.abstract_batch(pipeline.fields(self._heldout[1]), self._mesh, self.rows)
    devices = mesh_lib.on_each(self._mesh)
    stop = jax.ShapeDtypeStruct((self._mesh.size,), np.int32, sharding=devices)

    def evaluate(params, frozen, batch, key, stop):
      return self._stage.evaluate(params, frozen, batch, key), jax.numpy.max(stop)

    replicated = NamedSharding(self._mesh, PartitionSpec())
    jitted = jax.jit(evaluate, out_shardings=replicated)
    with jax.set_mesh(self._mesh):
      key = jax.eval_shape(self._key)  # Abstract, since the devices may not be attached.
      return jitted.lower(params, frozen, batch, key, stop)

  def compile(self, params: Any) -> None:
    """Compiles for parameters of these shapes and shardings, which may be abstract."""
    if self._compiled is None:
      self._compiled = self.lowered(params, self._stage.frozen).compile()

  def __call__(
    self, params: Any, stopped: Callable[[], bool] = lambda: False
  ) -> dict[str, Any] | None:
    """Returns the stage's figures, with the context, seed and counts that they depend on.

    Args:
      stopped: called before every batch. Once it returns True on any process, all processes
        stop and return None.
    """
    store, context, batch_size, limit = self._heldout
    self.compile(params)
    assert self._compiled is not None and store is not None
    key = self._key()
    own, parts = mesh_lib.own_rows(self._mesh, batch_size), []
    for batch, rows in pipeline.heldout_batches(store, context, batch_size, limit, own):
      batch = mesh_lib.place_rows(self._mesh, batch, own, batch_size)
      stop = mesh_lib.place_on_each(self._mesh, np.asarray(stopped(), np.int32))
      scores, is_stopped = jax.device_get(
        self._compiled(params, self._stage.frozen, batch, key, stop)
      )
      if is_stopped:
        return None
      parts.append(jax.tree.map(lambda x, rows=rows: x[:rows], scores))
    scores = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    blocks = len(next(iter(scores.values())))
    return self._stage.summarize(scores) | {
      "context_tokens": context,
      "blocks": blocks,
      "tokens": blocks * context,
      "seed": self._seed,
    }
