"""Samples -> numbers: the energy score, stage two's objective."""

import jax
from jax import numpy as jnp


def norm_power(x_Z: jax.Array, alpha: float) -> jax.Array:
  """Returns ‖x‖^alpha over the last axis; its gradient at x = 0 is 0, not NaN."""
  square = jnp.sum(jnp.square(x_Z), axis=-1)
  positive = square > 0
  return jnp.where(positive, jnp.where(positive, square, 1.0) ** (alpha / 2), 0.0)


def attraction(sample_NPZ: jax.Array, target_MPZ: jax.Array, alpha: float = 1.0) -> jax.Array:
  """Mean distance of samples to posterior draws, to the power alpha, [...]. Lower is nearer."""
  distance_NMP = norm_power(sample_NPZ[:, None] - target_MPZ[None], alpha)
  return jnp.mean(distance_NMP, axis=(0, 1))


def repulsion(sample_NPZ: jax.Array, alpha: float = 1.0) -> jax.Array:
  """Mean distance among different samples, to the power alpha, [...]. Higher is more diverse."""
  count = sample_NPZ.shape[0]
  distance_NNP = norm_power(sample_NPZ[:, None] - sample_NPZ[None], alpha)
  return jnp.sum(distance_NNP, axis=(0, 1)) / (count * (count - 1))


def energy_loss(sample_NPZ: jax.Array, target_MPZ: jax.Array, alpha: float = 1.0) -> jax.Array:
  """Negative energy score of model samples against posterior draws, [...].

  2 · mean ‖z_m − ẑ_n‖^alpha − mean over n ≠ k of ‖ẑ_n − ẑ_k‖^alpha. Unbiased for N
  independent samples. Lower is better; the unit is the latent unit to the power
  `alpha`, so values compare only within one autoencoder.

  Raises:
    ValueError: if N < 2, where the repulsion would divide by zero, or alpha lies
      outside (0, 2]. At 2 the score is not proper: it asks for the right mean alone.

  Source: CALM (arXiv:2510.27688), eq. 9 and 10.
  """
  if sample_NPZ.shape[0] < 2:
    raise ValueError(f"the energy loss needs N >= 2 samples, got {sample_NPZ.shape[0]}")
  if not 0 < alpha <= 2:
    raise ValueError(f"alpha must lie in (0, 2], got {alpha}")
  return 2 * attraction(sample_NPZ, target_MPZ, alpha) - repulsion(sample_NPZ, alpha)
