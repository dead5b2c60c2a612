"""Candidates -> one patch: temperature for a model that can only be sampled from."""

import math

import jax
from jax import numpy as jnp

from calm_jax import errors


def reciprocal(temperature: float) -> int:
  """Returns n for a temperature of 1/n.

  Raises:
    CalmError: if the temperature lies outside (0, 1] or is not 1/n.
  """
  if not (math.isfinite(temperature) and 0 < temperature <= 1):
    raise errors.CalmError(f"temperature must lie in (0, 1], got {temperature}")
  n = round(1 / temperature)
  if abs(1 / temperature - n) > 1e-2:
    raise errors.CalmError(
      f"temperature must be 1/n for a whole n (1, 0.5, 0.333, 0.25, ...), got {temperature}; the "
      f"nearest is {1 / n:.3g}"
    )
  return n


def batch_weights(token_NK: jax.Array, allowed_N: jax.Array, n: int) -> jax.Array:
  """Weights by which one of N candidates stands for P(x)^n, the temperature 1/n: [N].

  For m = n, n − 1, ..., 1: patches seen at least m times among the allowed
  candidates weigh C(count, m), shared equally by their copies; the first m that
  some patch reaches decides. All zero if nothing is allowed. Consistent as N
  grows, biased towards a higher temperature where N is small; at n = 1 exact.

  Args:
    token_NK: patches, int.
    allowed_N: bool; candidates that are no continuation are left out.

  Source: CALM (arXiv:2510.27688), algorithm 2.
  """
  same_NN = jnp.all(token_NK[:, None] == token_NK[None], axis=-1) & allowed_N[None]
  count_N = jnp.where(allowed_N, jnp.sum(same_NN, axis=-1), 0).astype(jnp.float32)
  weight_N = jnp.zeros_like(count_N)
  combinations_N = jnp.ones_like(count_N)
  for m in range(1, n + 1):
    combinations_N *= jnp.maximum(count_N - m + 1, 0) / m  # C(count, m) from C(count, m - 1).
    share_N = jnp.where(count_N > 0, combinations_N / jnp.maximum(count_N, 1), 0)
    weight_N = jnp.where(jnp.any(share_N > 0), share_N, weight_N)
  return weight_N


def choose(key: jax.Array, weight_N: jax.Array) -> jax.Array:
  """Returns the index of one candidate, drawn by weight; some weight must be positive."""
  return jax.random.categorical(key, jnp.log(weight_N))
