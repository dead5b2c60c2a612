"""Hidden -> samples: the flow-matching head, a velocity field integrated by the midpoint rule."""

import jax
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import layers
from calm_jax.models.heads import denoiser, head
from calm_jax.objectives import autoencoding, flow_matching


def network_time(t: jax.Array) -> jax.Array:
  """Returns the time that the network reads for t in [0, 1): floor(1000 t)."""
  return jnp.floor(1000 * t)


class FlowHead(denoiser.DenoiserHead):
  """Integrates standard normal noise at t = 0 to samples of the next latent at t = 1.

  Source: CALM (arXiv:2510.27688), section 7.4; midpoint rule as in the reference.
  """

  loss_unit = "latent unit²"
  reference_kind = "flow"
  published_steps = 10
  calls = 2  # The midpoint rule's.

  def loss(
    self,
    params: head.Params,
    hidden_PD: jax.Array,
    posterior: head.Posterior,
    key: jax.Array,
    settings: config.CalmLoss,
  ) -> tuple[jax.Array, head.Figures]:
    """Flow-matching loss [P], mean over N times, starts and targets per patch."""
    time_key, start_key, target_key = jax.random.split(key, 3)
    z_NPZ = autoencoding.posterior_draws(target_key, *posterior, settings.samples)
    start_NPZ = jax.random.normal(start_key, z_NPZ.shape)
    t_NP = jax.random.uniform(time_key, z_NPZ.shape[:-1])
    x_NPZ = flow_matching.between(t_NP, start_NPZ, z_NPZ)
    velocity_NPZ = self.velocity(params, x_NPZ, hidden_PD, t_NP)
    loss_NP = flow_matching.flow_matching_loss(velocity_NPZ, start_NPZ, z_NPZ)
    return jnp.mean(loss_NP, axis=0), {}

  def velocity(
    self, params: head.Params, x_NZ: jax.Array, hidden_D: jax.Array, t_N: jax.Array
  ) -> jax.Array:
    """Returns dx/dt at latents [N, ..., Z] and times [N, ...] in [0, 1): [N, ..., Z]."""
    return layers.apply(self.network, params, x_NZ, hidden_D, network_time(t_N))

  def samples(self, params: head.Params, condition: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns N latents [N, ..., Z] float32, given `condition` and noise [N, ..., Z]."""

    def slope(x_NZ, half_steps):
      time = (1000 * half_steps) // (2 * self.steps)  # In whole numbers: no rounding of t.
      time_N = jnp.full(x_NZ.shape[:-1], time)
      return layers.apply(self.network, params, x_NZ, condition, time_N, method="predict")

    def step(i, x_NZ):
      middle_NZ = x_NZ + slope(x_NZ, 2 * i) / (2 * self.steps)
      return x_NZ + slope(middle_NZ, 2 * i + 1) / self.steps

    return jax.lax.fori_loop(0, self.steps, step, noise)
