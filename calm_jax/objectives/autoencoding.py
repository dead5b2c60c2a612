"""Posteriors -> draws and numbers: what stage one minimises and reports."""

import jax
from jax import numpy as jnp


def posterior_draws(
  key: jax.Array, mean_Z: jax.Array, log_std_Z: jax.Array, count: int
) -> jax.Array:
  """Returns `count` (M) draws z = mean + std · eps of posteriors [..., Z]: [M, ..., Z]."""
  eps_MZ = jax.random.normal(key, (count, *mean_Z.shape))
  return mean_Z[None] + jnp.exp(log_std_Z)[None] * eps_MZ


def kl_to_standard_normal(mean_Z: jax.Array, log_std_Z: jax.Array) -> jax.Array:
  """KL(N(mean, std²) ‖ N(0, 1)) per dimension, nats, same shape. Lower is closer to N(0, 1)."""
  return 0.5 * (jnp.square(mean_Z) + jnp.exp(2 * log_std_Z) - 1 - 2 * log_std_Z)


def floored_kl(mean_Z: jax.Array, log_std_Z: jax.Array, floor: float) -> jax.Array:
  """KL to N(0, I) in nats, each dimension at least `floor`, summed over Z: [...].

  Lower is better. A dimension below the floor has no gradient.

  Source: CALM (arXiv:2510.27688), section 3.2 (KL clipping).
  """
  return jnp.sum(jnp.maximum(kl_to_standard_normal(mean_Z, log_std_Z), floor), axis=-1)


def drop_tokens(key: jax.Array, token: jax.Array, rate: float, replacement: int) -> jax.Array:
  """Returns tokens, each replaced by `replacement` with probability `rate` (DropToken)."""
  return jnp.where(jax.random.bernoulli(key, rate, token.shape), replacement, token)


def drop_latents(key: jax.Array, z_Z: jax.Array, rate: float) -> jax.Array:
  """Returns z, each entry 0 with probability `rate`, else times 1/(1 − rate) (DropLatent)."""
  return jnp.where(jax.random.bernoulli(key, 1 - rate, z_Z.shape), z_Z / (1 - rate), 0.0)
