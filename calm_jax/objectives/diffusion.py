"""Samples -> numbers: the diffusion loss."""

import math

import jax
from jax import numpy as jnp

from calm_jax.models import diffusion_head

BIN = 1 / 255  # Half the width of what the first level's density is integrated over.


def mean_squared_error(prediction_N2Z: jax.Array, noise_NZ: jax.Array) -> jax.Array:
  """Mean squared error of the predicted noise: [..., 2Z], [..., Z] -> [...]. Lower is better."""
  predicted_NZ, _ = jnp.split(prediction_N2Z, 2, axis=-1)
  return jnp.mean(jnp.square(predicted_NZ - noise_NZ), axis=-1)


def variational_term(
  levels: diffusion_head.Levels,
  prediction_N2Z: jax.Array,
  z_NZ: jax.Array,
  x_NZ: jax.Array,
  level_N: jax.Array,
) -> jax.Array:
  """One level's term of the variational bound, in bits a dimension: [...]. Lower is better.

  The KL from the true step down to the predicted one; at level 0 minus the log
  probability of the latent under the predicted step. It trains the variance
  only: no gradient flows into the predicted noise.

  Source: Nichol and Dhariwal (arXiv:2102.09672), section 3.1. As in the published
  code of both, level 0 integrates the density over bins of pixels, 2/255 wide, and
  outside (−1, 1) over everything beyond, though latents are no pixels.
  """
  predicted_NZ, between_NZ = jnp.split(prediction_N2Z, 2, axis=-1)
  detached = jnp.concatenate([jax.lax.stop_gradient(predicted_NZ), between_NZ], axis=-1)
  mean_NZ, log_variance_NZ = diffusion_head.step_law(levels, x_NZ, detached, level_N)
  at = levels.at(level_N)
  true_mean_NZ = at["start_of_mean"] * z_NZ + at["current_of_mean"] * x_NZ
  kl_NZ = 0.5 * (
    log_variance_NZ
    - at["log_variance"]
    - 1
    + jnp.exp(at["log_variance"] - log_variance_NZ)
    + jnp.square(true_mean_NZ - mean_NZ) * jnp.exp(-log_variance_NZ)
  )
  nll_NZ = -_log_probability_of_bin(z_NZ, mean_NZ, log_variance_NZ / 2)
  nats_NZ = jnp.where((level_N == 0)[..., None], nll_NZ, kl_NZ)
  return jnp.mean(nats_NZ, axis=-1) / math.log(2)


def _log_probability_of_bin(z_NZ, mean_NZ, log_std_NZ):
  def below(edge_NZ):
    """The normal distribution function, in tanh's approximation, as published."""
    x = (edge_NZ - mean_NZ) * jnp.exp(-log_std_NZ)
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

  up_to_NZ, from_NZ = below(z_NZ + BIN), below(z_NZ - BIN)
  share_NZ = jnp.where(
    z_NZ < -0.999, up_to_NZ, jnp.where(z_NZ > 0.999, 1 - from_NZ, up_to_NZ - from_NZ)
  )
  return jnp.log(jnp.maximum(share_NZ, 1e-12))
