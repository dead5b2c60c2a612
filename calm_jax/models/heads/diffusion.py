"""Hidden -> samples: the diffusion head, with 1000 noise levels and 100 sampling steps."""

from collections.abc import Callable

import jax
from jax import numpy as jnp

from calm_jax import config
from calm_jax.figures import LOWER, Figure
from calm_jax.models import layers
from calm_jax.models.heads import denoiser, head
from calm_jax.objectives import autoencoding, diffusion


class DiffusionHead(denoiser.DenoiserHead):
  """Denoises standard normal noise to samples of the next latent.

  Source: CALM (arXiv:2510.27688), section 7.4; the diffusion is that of Nichol and
  Dhariwal (arXiv:2102.09672): noise prediction, learned range variance, no clipping.
  """

  loss_unit = "noise MSE + bits a dimension"
  reference_kind = "diffusion"
  figures = (
    Figure("noise_mse", "Error of the predicted noise", "squared noise unit", LOWER),
    Figure("variational", "Variational term", "bits a dimension", LOWER),
  )
  outputs = 2  # The noise, and the variance within its range.
  published_steps = 100  # Evenly spaced.
  fewest_steps = 2
  onnx_obstacle = "whose sampling loop the exporter would write out step by step"

  def __init__(self, sizes: config.Head, trunk: head.Trunk):
    super().__init__(sizes, trunk)
    self.levels = diffusion.Levels.evenly(self.steps)
    self.noise_shape = (1 + self.steps, trunk.latent)  # The start, then one per step.

  def loss(
    self,
    params: head.Params,
    hidden_PD: jax.Array,
    posterior: head.Posterior,
    key: jax.Array,
    settings: config.CalmLoss,
  ) -> tuple[jax.Array, head.Figures]:
    """Noise MSE plus variational term [P], mean over N levels, noises and targets per patch."""
    level_key, noise_key, target_key = jax.random.split(key, 3)
    levels = diffusion.Levels.evenly(diffusion.LEVELS)
    z_NPZ = autoencoding.posterior_draws(target_key, *posterior, settings.samples)
    noise_NPZ = jax.random.normal(noise_key, z_NPZ.shape)
    level_NP = jax.random.randint(level_key, z_NPZ.shape[:-1], 0, diffusion.LEVELS)
    x_NPZ = diffusion.noised(levels, z_NPZ, level_NP, noise_NPZ)
    prediction = layers.apply(self.network, params, x_NPZ, hidden_PD, level_NP)
    error_NP = diffusion.mean_squared_error(prediction, noise_NPZ)
    bound_NP = diffusion.variational_term(levels, prediction, z_NPZ, x_NPZ, level_NP)
    error_P, bound_P = jnp.mean(error_NP, axis=0), jnp.mean(bound_NP, axis=0)
    return error_P + bound_P, {"noise_mse": error_P, "variational": bound_P}

  def samples(self, params: head.Params, condition: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns N latents [N, ..., Z] float32, given `condition`.

    Args:
      noise: [N, ..., 1 + T, Z] for T steps: the start, then each step's; the last is not used.
    """
    return self._denoise(params, condition, lambda i: jnp.take(noise, i, axis=-2))

  def sample(
    self, params: head.Params, hidden_D: jax.Array, key: jax.Array, count: int
  ) -> jax.Array:
    """Returns `count` (N) latents [N, ..., Z] float32; each step draws its own noise."""
    shape = (count, *hidden_D.shape[:-1], self.latent)
    condition_D = self.condition(params, hidden_D)
    return self._denoise(
      params, condition_D, lambda i: jax.random.normal(jax.random.fold_in(key, i), shape)
    )

  def _denoise(
    self, params: head.Params, condition_D: jax.Array, noise: Callable[[int | jax.Array], jax.Array]
  ) -> jax.Array:
    def step(i, x_NZ):
      level = self.steps - 1 - i
      level_N = jnp.full(x_NZ.shape[:-1], level)
      time_N = jnp.asarray(self.levels.time_T)[level_N]
      prediction = layers.apply(self.network, params, x_NZ, condition_D, time_N, method="predict")
      mean_NZ, log_variance_NZ = diffusion.step_law(self.levels, x_NZ, prediction, level_N)
      return mean_NZ + jnp.where(level > 0, jnp.exp(log_variance_NZ / 2), 0) * noise(i + 1)

    return jax.lax.fori_loop(0, self.steps, step, noise(0))
