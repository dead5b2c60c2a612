"""Counts of equal draws -> weights to choose one by: temperature without likelihoods."""

import math

import jax
from jax import numpy as jnp

from calm_jax import config, errors

# 1/T within this distance of an integer is rounded to it: 0.333 means a third.
NEAR = 1e-2


def power(temperature: float) -> float:
  """Returns s = 1/T, the power to which the probability of a patch is raised.

  Raises:
    CalmError: if the temperature is outside (0, 1], which sampling alone can't reach.
  """
  if not (math.isfinite(temperature) and 0 < temperature <= 1):
    raise errors.CalmError(
      f"CALM's temperature must lie in (0, 1], got {temperature}: give another --temperature"
    )
  exact = 1 / temperature
  is_near = math.isfinite(exact) and abs(exact - round(exact)) <= NEAR
  return float(round(exact)) if is_near else exact


def token_power(temperature: float) -> float:
  """Returns 1/T for `tempered`: single tokens can have any temperature above 0.

  Raises:
    CalmError: if T is not above 0, or not finite.
  """
  largest = config.FLOATS[1]
  if not 0 < temperature <= largest:
    raise errors.CalmError(f"temperature must be above 0 and finite, got {temperature}")
  return min(1 / temperature, largest)


def tempered(logits_BV: jax.Array, power_B: jax.Array) -> jax.Array:
  """Returns logits of P(x)^s, s = 1/T, up to a constant per row, [B, V]: at most 0.

  The largest is 0 for every s, so that none overflows. As T tends to 0, the others tend to
  -inf, so that the most likely token is taken, or one of those that tie.
  """
  largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  return (logits_BV - largest_B1) * power_B[:, None]


def log_weights(count_BN: jax.Array, power_B: jax.Array) -> jax.Array:
  """Returns log weights for choosing one of N draws approximately by P(x)^s, [B, N].

  A patch that was drawn c times has the weight C(c, s) = Γ(c+1) / (Γ(s+1) Γ(c−s+1)), the
  generalized binomial coefficient, if c is at least n, the integer part of s; equal draws
  share it. If no patch has so many draws, s − 1 replaces s, and so on. C(c, s) is how often
  the exact two-stage algorithm accepts the patch, over all orders of the N draws, where
  running out of draws in its second stage counts as acceptance. A patch's mean weight is

      p^n (p^a + Σ_{i > N−n} |C(a, i)| (1−p)^i),   a = s − n,

  up to a common factor: exact if s is an integer, somewhat too large for rare patches
  otherwise. The distribution itself, a ratio, is biased towards a higher temperature at small N.

  Args:
    count_BN: how often each draw occurs among its row's draws; 0 in an empty slot.
    power_B: s, at least 1.

  Source: CALM (arXiv:2510.27688), algorithm 2, which covers T = 1/n only.
  """
  most_B = jnp.max(count_BN, axis=-1)
  level_B = power_B - jnp.maximum(jnp.floor(power_B) - most_B, 0)
  level_B1 = level_B[:, None]
  is_eligible_BN = count_BN >= jnp.maximum(jnp.floor(level_B1), 1)
  safe_count_BN = jnp.where(is_eligible_BN, count_BN, jnp.ceil(level_B1)).astype(jnp.float32)
  gammaln = jax.scipy.special.gammaln
  log_BN = (
    gammaln(safe_count_BN + 1) - gammaln(safe_count_BN - level_B1 + 1) - jnp.log(safe_count_BN)
  )
  return jnp.where(is_eligible_BN, log_BN, -jnp.inf)
