"""Hidden -> samples: the flow-matching head, a velocity field integrated by the midpoint rule."""

from typing import Any

import jax
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import denoiser, layers

STEPS = 10  # Published: 10 midpoint steps, 20 calls of the network.


def network_time(t: jax.Array) -> jax.Array:
  """Returns what the network is told of a time in [0, 1): floor(1000 t)."""
  return jnp.floor(1000 * t)


class FlowHead:
  """Carries standard normal noise at t = 0 to samples of the next latent at t = 1.

  Source: CALM (arXiv:2510.27688), section 7.4; midpoint rule as in the reference.
  """

  def __init__(
    self, sizes: config.Head, width: int, latent: int, scheme: str,
    dtype: jnp.dtype = jnp.float32, remat: str = "none",
  ):  # fmt: skip
    self.network = denoiser.Denoiser(sizes, width, latent, dtype, remat)
    self.noise_shape = (latent,)
    self.steps = sizes.steps or STEPS

  def init(self, key: jax.Array) -> Any:
    """Returns initial parameters, float32. At the start the velocity is zero."""
    return denoiser.init(self.network, key, *self.noise_shape)

  def draw_noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns standard normal noise [*shape, Z]."""
    return jax.random.normal(key, (*shape, *self.noise_shape))

  def velocity(
    self, params: Any, x_NZ: jax.Array, hidden_D: jax.Array, t_N: jax.Array
  ) -> jax.Array:
    """Returns dx/dt at latents [N, ..., Z] and times [N, ...] in [0, 1): [N, ..., Z]."""
    return layers.apply(self.network, params, x_NZ, hidden_D, network_time(t_N))

  def condition(self, params: Any, hidden_D: jax.Array) -> jax.Array:
    """Returns what all samples of hidden states [..., D] share: [..., D]."""
    return layers.apply(self.network, params, hidden_D, method="condition")

  def samples(self, params: Any, condition: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns N latents [N, ..., Z] float32, given `condition` and noise [N, ..., Z]."""

    def slope(x_NZ, half_steps):
      time = (1000 * half_steps) // (2 * self.steps)  # In whole numbers: no rounding of t.
      time_N = jnp.full(x_NZ.shape[:-1], time)
      return layers.apply(self.network, params, x_NZ, condition, time_N, method="predict")

    def step(i, x_NZ):
      middle_NZ = x_NZ + slope(x_NZ, 2 * i) / (2 * self.steps)
      return x_NZ + slope(middle_NZ, 2 * i + 1) / self.steps

    return jax.lax.fori_loop(0, self.steps, step, noise)

  def sample(self, params: Any, hidden_D: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """Returns `count` latents [N, ..., Z] float32 for hidden states [..., D]."""
    noise_NZ = self.draw_noise(key, (count, *hidden_D.shape[:-1]))
    return self.samples(params, self.condition(params, hidden_D), noise_NZ)
