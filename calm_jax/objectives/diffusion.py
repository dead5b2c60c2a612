"""Latents -> noised latents, and predictions -> numbers: the diffusion process and its loss."""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax import numpy as jnp

LEVELS = 1000  # Noise levels in training.
MAX_BETA = 0.999
BIN = 1 / 255  # Half the width that the first level's density is integrated over.


def cosine_alphas_cumprod() -> np.ndarray:
  """Returns the share of signal variance after each level, float64 [1000], falling."""
  edge = np.cos((np.arange(LEVELS + 1) / LEVELS + 0.008) / 1.008 * np.pi / 2) ** 2
  return np.cumprod(1 - np.minimum(1 - edge[1:] / edge[:-1], MAX_BETA))


@dataclasses.dataclass(frozen=True)
class Levels:
  """A Gaussian diffusion over T of the 1000 levels.

  Attributes:
    time_T: the time that the network reads: the level's index among the 1000.
    alphas_cumprod_T: share of signal variance, float64, falling.
  """

  time_T: np.ndarray
  alphas_cumprod_T: np.ndarray

  @classmethod
  def evenly(cls, count: int) -> "Levels":
    """Returns `count` (T) evenly spaced levels, the first and the last of the 1000 included."""
    time_T = np.round(np.linspace(0, LEVELS - 1, count)).astype(int)
    return cls(time_T, cosine_alphas_cumprod()[time_T])

  @functools.cached_property
  def tables(self) -> dict[str, np.ndarray]:
    """Coefficients by level, float32 [T], each computed in float64."""
    now = self.alphas_cumprod_T
    before = np.append(1.0, now[:-1])
    beta = 1 - now / before
    variance = beta * (1 - before) / (1 - now)
    variance[0] = variance[1]  # The last step's variance is 0, whose logarithm is not finite.
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
    """Returns every coefficient at levels [...], each [..., 1] to broadcast over latents."""
    return {name: jnp.asarray(table)[level_N][..., None] for name, table in self.tables.items()}


def noised(levels: Levels, z_NZ: jax.Array, level_N: jax.Array, noise_NZ: jax.Array) -> jax.Array:
  """Returns latents [..., Z] noised to levels [...] with standard normal noise: [..., Z]."""
  at = levels.at(level_N)
  return at["signal"] * z_NZ + at["noise"] * noise_NZ


def step_law(
  levels: Levels, x_NZ: jax.Array, prediction_N2Z: jax.Array, level_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns mean and log variance, [..., Z] each, of the step down from a level.

  Args:
    x_NZ: noised latents.
    prediction_N2Z: the network's output: the noise, then the position of the log variance
      between the posterior's (−1) and beta's (1).
  """
  at = levels.at(level_N)
  noise_NZ, between_NZ = jnp.split(prediction_N2Z, 2, axis=-1)
  # The posterior's mean at the latent that the noise implies, without dividing by the signal.
  mean_NZ = (x_NZ - at["noise_in_step"] * noise_NZ) / at["signal_in_step"]
  share_NZ = (between_NZ + 1) / 2
  return mean_NZ, share_NZ * at["log_beta"] + (1 - share_NZ) * at["log_variance"]


def mean_squared_error(prediction_N2Z: jax.Array, noise_NZ: jax.Array) -> jax.Array:
  """Mean squared error of the predicted noise: [..., 2Z], [..., Z] -> [...]. Lower is better."""
  predicted_NZ, _ = jnp.split(prediction_N2Z, 2, axis=-1)
  return jnp.mean(jnp.square(predicted_NZ - noise_NZ), axis=-1)


def variational_term(
  levels: Levels,
  prediction_N2Z: jax.Array,
  z_NZ: jax.Array,
  x_NZ: jax.Array,
  level_N: jax.Array,
) -> jax.Array:
  """One level's term of the variational bound, in bits per dimension: [...]. Lower is better.

  The KL divergence from the true step down to the predicted one; at level 0, minus the log
  probability of the latent under the predicted step. The term trains the variance only: no
  gradient flows into the predicted noise.

  Source: Nichol and Dhariwal (arXiv:2102.09672), section 3.1. As in the published code of
  both papers, level 0 integrates the density over bins of pixels, 2/255 wide, and over
  everything beyond outside (−1, 1), though latents are not pixels.
  """
  predicted_NZ, between_NZ = jnp.split(prediction_N2Z, 2, axis=-1)
  detached = jnp.concatenate([jax.lax.stop_gradient(predicted_NZ), between_NZ], axis=-1)
  mean_NZ, log_variance_NZ = step_law(levels, x_NZ, detached, level_N)
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


def _log_probability_of_bin(
  z_NZ: jax.Array, mean_NZ: jax.Array, log_std_NZ: jax.Array
) -> jax.Array:
  """Returns the log probability of each latent's bin under a normal distribution, same shape."""

  def below(edge_NZ):
    """The normal distribution function, approximated by tanh as published."""
    x = (edge_NZ - mean_NZ) * jnp.exp(-log_std_NZ)
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

  up_to_NZ, from_NZ = below(z_NZ + BIN), below(z_NZ - BIN)
  share_NZ = jnp.where(
    z_NZ < -0.999, up_to_NZ, jnp.where(z_NZ > 0.999, 1 - from_NZ, up_to_NZ - from_NZ)
  )
  return jnp.log(jnp.maximum(share_NZ, 1e-12))
