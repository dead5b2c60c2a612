"""Hidden -> samples: the diffusion head, 1000 noise levels walked back in 100 steps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import denoiser, layers

LEVELS = 1000  # Noise levels in training.
STEPS = 100  # Published: evenly spaced sampling steps.
MAX_BETA = 0.999


def cosine_alphas_cumprod() -> np.ndarray:
  """Returns the share of signal variance after each level, float64 [1000], falling."""
  edge = np.cos((np.arange(LEVELS + 1) / LEVELS + 0.008) / 1.008 * np.pi / 2) ** 2
  return np.cumprod(1 - np.minimum(1 - edge[1:] / edge[:-1], MAX_BETA))


@dataclasses.dataclass(frozen=True)
class Levels:
  """A Gaussian diffusion over some of the 1000 levels, T of them.

  Attributes:
    time_T: what the network is told: the level among the 1000.
    alphas_cumprod_T: share of signal variance, float64, falling.
  """

  time_T: np.ndarray
  alphas_cumprod_T: np.ndarray

  @classmethod
  def evenly(cls, count: int) -> "Levels":
    """Returns `count` evenly spaced of the 1000 levels, the first and the last among them."""
    time_T = np.round(np.linspace(0, LEVELS - 1, count)).astype(int)
    return cls(time_T, cosine_alphas_cumprod()[time_T])

  @functools.cached_property
  def tables(self) -> dict[str, np.ndarray]:
    """Coefficients by level, float32 [T], each computed in float64."""
    now = self.alphas_cumprod_T
    before = np.append(1.0, now[:-1])
    beta = 1 - now / before
    variance = beta * (1 - before) / (1 - now)
    variance[0] = variance[1]  # The last step's is 0, whose logarithm is not finite.
    tables = {
      "signal": np.sqrt(now),
      "noise": np.sqrt(1 - now),
      "start_of_mean": beta * np.sqrt(before) / (1 - now),
      "current_of_mean": (1 - before) * np.sqrt(1 - beta) / (1 - now),
      "noise_in_step": beta / np.sqrt(1 - now),
      "signal_in_step": np.sqrt(1 - beta),
      "log_variance": np.log(variance),
      "log_beta": np.log(beta),
    }
    return {name: table.astype(np.float32) for name, table in tables.items()}

  def at(self, level_N: jax.Array) -> dict[str, jax.Array]:
    """Returns every coefficient at levels [...], each [..., 1] to go with latents."""
    return {name: jnp.asarray(table)[level_N][..., None] for name, table in self.tables.items()}


def noised(levels: Levels, z_NZ: jax.Array, level_N: jax.Array, noise_NZ: jax.Array) -> jax.Array:
  """Returns latents at levels [...], with standard normal noise: [..., Z]."""
  at = levels.at(level_N)
  return at["signal"] * z_NZ + at["noise"] * noise_NZ


def step_law(
  levels: Levels, x_NZ: jax.Array, prediction_N2Z: jax.Array, level_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns mean and log variance, [..., Z] each, of the step down from a level.

  Args:
    x_NZ: noised latents.
    prediction_N2Z: the network's: the noise, then where the log variance lies
      between the posterior's (−1) and beta's (1).
  """
  at = levels.at(level_N)
  noise_NZ, between_NZ = jnp.split(prediction_N2Z, 2, axis=-1)
  # The posterior's mean at the latent that the noise implies, without dividing by the signal.
  mean_NZ = (x_NZ - at["noise_in_step"] * noise_NZ) / at["signal_in_step"]
  share_NZ = (between_NZ + 1) / 2
  return mean_NZ, share_NZ * at["log_beta"] + (1 - share_NZ) * at["log_variance"]


class DiffusionHead:
  """Walks standard normal noise back to samples of the next latent.

  Source: CALM (arXiv:2510.27688), section 7.4; the diffusion is that of Nichol and
  Dhariwal (arXiv:2102.09672): noise prediction, learned range variance, no clipping.
  """

  def __init__(
    self, sizes: config.Head, width: int, latent: int, scheme: str,
    dtype: jnp.dtype = jnp.float32, remat: str = "none",
  ):  # fmt: skip
    self.network = denoiser.Denoiser(sizes, width, 2 * latent, dtype, remat)
    self.latent = latent
    self.levels = Levels.evenly(sizes.steps or STEPS)
    self.noise_shape = (1 + len(self.levels.time_T), latent)

  def init(self, key: jax.Array) -> Any:
    """Returns initial parameters, float32. At the start the predicted noise is zero."""
    return denoiser.init(self.network, key, self.latent)

  def draw_noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns standard normal noise [*shape, 1 + T, Z]: the start, then one a step."""
    return jax.random.normal(key, (*shape, *self.noise_shape))

  def condition(self, params: Any, hidden_D: jax.Array) -> jax.Array:
    """Returns what all samples of hidden states [..., D] share: [..., D]."""
    return layers.apply(self.network, params, hidden_D, method="condition")

  def samples(self, params: Any, condition: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns N latents [N, ..., Z] float32, given `condition`.

    Args:
      noise: [N, ..., 1 + T, Z]; the last step's is not used.
    """
    return self._walk(params, condition, lambda i: jnp.take(noise, i, axis=-2))

  def sample(self, params: Any, hidden_D: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """Returns `count` latents [N, ..., Z] float32; each step's noise is drawn as it comes."""
    shape = (count, *hidden_D.shape[:-1], self.latent)
    condition_D = self.condition(params, hidden_D)
    return self._walk(
      params, condition_D, lambda i: jax.random.normal(jax.random.fold_in(key, i), shape)
    )

  def _walk(
    self, params: Any, condition_D: jax.Array, noise: Callable[[int | jax.Array], jax.Array]
  ) -> jax.Array:
    count = len(self.levels.time_T)

    def step(i, x_NZ):
      level = count - 1 - i
      level_N = jnp.full(x_NZ.shape[:-1], level)
      time_N = jnp.asarray(self.levels.time_T)[level_N]
      prediction = layers.apply(self.network, params, x_NZ, condition_D, time_N, method="predict")
      mean_NZ, log_variance_NZ = step_law(self.levels, x_NZ, prediction, level_N)
      return mean_NZ + jnp.where(level > 0, jnp.exp(log_variance_NZ / 2), 0) * noise(i + 1)

    return jax.lax.fori_loop(0, count, step, noise(0))
