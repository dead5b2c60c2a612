"""Samples -> numbers: the energy score, stage two's objective."""

import jax
from jax import numpy as jnp


def norm_power(x_Z: jax.Array, alpha: float) -> jax.Array:
  """Returns ‖x‖^alpha over the last axis; its gradient at x = 0 is 0, not NaN."""
  square = jnp.sum(jnp.square(x_Z), axis=-1)
  positive = square > 0
  return jnp.where(positive, jnp.where(positive, square, 1.0) ** (alpha / 2), 0.0)


def attraction(sample_NBPZ: jax.Array, target_MBPZ: jax.Array, alpha: float = 1.0) -> jax.Array:
  """Mean distance of samples to posterior draws, to the power alpha, [B, P]. Lower is nearer."""
  distance_NMBP = norm_power(sample_NBPZ[:, None] - target_MBPZ[None], alpha)
  return jnp.mean(distance_NMBP, axis=(0, 1))


def repulsion(sample_NBPZ: jax.Array, alpha: float = 1.0) -> jax.Array:
  """Mean distance among different samples, to the power alpha, [B, P]. Higher is more diverse."""
  count = sample_NBPZ.shape[0]
  distance_NNBP = norm_power(sample_NBPZ[:, None] - sample_NBPZ[None], alpha)
  return jnp.sum(distance_NNBP, axis=(0, 1)) / (count * (count - 1))


def energy_loss(sample_NBPZ: jax.Array, target_MBPZ: jax.Array, alpha: float = 1.0) -> jax.Array:
  """Negative energy score of model samples against posterior draws, [B, P].

  2 · mean ‖z_m − ẑ_n‖^alpha − mean over n ≠ k of ‖ẑ_n − ẑ_k‖^alpha. Unbiased for N
  independent samples. Lower is better; the unit is the latent unit to the power
  `alpha`, so values compare only within one autoencoder.

  Raises:
    ValueError: if N < 2, where the repulsion would divide by zero, or alpha lies
      outside (0, 2), where the score is not proper.

  Source: CALM (arXiv:2510.27688), eq. 9 and 10.
  """
  if sample_NBPZ.shape[0] < 2:
    raise ValueError(f"the energy loss needs N >= 2 samples, got {sample_NBPZ.shape[0]}")
  if not 0 < alpha < 2:
    raise ValueError(f"alpha must lie in (0, 2), got {alpha}")
  return 2 * attraction(sample_NBPZ, target_MBPZ, alpha) - repulsion(sample_NBPZ, alpha)
