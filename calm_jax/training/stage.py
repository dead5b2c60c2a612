"""The functions of a stage that the training loop calls, pure functions of arrays."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax.objectives import brier
from calm_jax.parallel import mesh
from calm_jax.training import step

Params = Any
Batch = Mapping[str, jax.Array]
# Score name -> one row per example, [B, ...].
Scores = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of training.

  A batch has the fields of its source, by default those of `data.pipeline.fields`. An example's
  noise is keyed by its `index` in the global stream, so that neither accumulation nor the number
  of hosts changes it.

  Attributes:
    init: key -> initial values of the trained parameters.
    loss: (params, frozen, batch, key) -> (mean loss, metrics); see `step.Loss`.
    evaluate: (params, frozen, batch, key) -> scores of each example.
    summarize: scores of all examples -> reported figures.
    frozen: parameters that the stage reads but does not train.
  """

  init: Callable[[jax.Array], Params]
  loss: step.Loss
  evaluate: Callable[[Params, Params, Batch, jax.Array], Scores]
  summarize: Callable[[Mapping[str, np.ndarray]], dict[str, Any]]
  frozen: Params = dataclasses.field(default_factory=dict)


def example_keys(key: jax.Array, index_B: jax.Array) -> jax.Array:
  """Returns one key per example, from its index in the global stream: [B]."""
  return jax.vmap(lambda index: jax.random.fold_in(key, index))(index_B)


def purpose_keys(key_B: jax.Array, purpose: int | jax.Array) -> jax.Array:
  """Returns each example's key for one kind of noise, numbered by `purpose`: [B]."""
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_B, purpose)


def patches(token_BS: jax.Array, patch_size: int) -> jax.Array:
  """Returns tokens as patches, [B, S] -> [B, P, K]."""
  token_BPK = token_BS.reshape(token_BS.shape[0], -1, patch_size)
  return mesh.constrain(token_BPK, "batch", "position", None)


def next_position(x_BP: jax.Array) -> jax.Array:
  """Shifts [B, P, ...] left by one position, wrapping; mask the last position by `has_next`.

  All P positions stay, so that a mesh divides them evenly.
  """
  return jnp.roll(x_BP, -1, axis=1)


def has_next(x_BP: jax.Array) -> jax.Array:
  """Returns the float32 mask [B, P] of positions that have a next one: 1, and 0 at the last."""
  mask_P = jnp.arange(x_BP.shape[1]) < x_BP.shape[1] - 1
  return jnp.broadcast_to(mask_P[None], x_BP.shape).astype(jnp.float32)


def one_in(every: int, x_BP: jax.Array, key_B: jax.Array) -> jax.Array:
  """Returns one position in `every` of [B, P, ...], from an example's random first one.

  `every` must divide P. The result is [B, P / every, ...], which a mesh divides as it does x.
  """
  if every == 1:
    return x_BP

  def strided(x_P, key):
    first = jax.random.randint(key, (), 0, every)
    return x_P.reshape(-1, every, *x_P.shape[1:])[:, first]

  return mesh.map_examples(strided)(x_BP, key_B)


def mean_with_next(x_BP: jax.Array) -> jax.Array:
  """Returns the mean of [B, P] over the positions of `has_next`."""
  mask_BP = has_next(x_BP)
  return jnp.sum(jnp.where(mask_BP > 0, x_BP, 0)) / mask_BP.sum()


def with_stderr(scores: Mapping[str, np.ndarray], *names: str) -> dict[str, float]:
  """Returns the mean of each named score over all examples, with its standard error."""
  result = {}
  for name in names:
    result[name] = float(scores[name].mean())
    result[f"{name}_stderr"] = brier.jackknife(scores[name], lambda mean: mean)
  return result
