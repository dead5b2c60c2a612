"""Hidden states and target posteriors -> each head's training loss: one row a head.

All take one example: hidden states [P, D], the posterior of each predicted patch,
(mean, log_std) [P, Z], and the example's key. They return the loss of each patch
[P], float32, lower is better, and what is reported beside it.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import calm, diffusion_head, flow_head, layers
from calm_jax.objectives import diffusion, energy_score, flow_matching

Params = Any
Posterior = tuple[jax.Array, jax.Array]
Figures = dict[str, jax.Array]


def _energy(
  head, params: Params, hidden_PD: jax.Array, posterior: Posterior, key: jax.Array,
  settings: config.CalmLoss,
) -> tuple[jax.Array, Figures]:  # fmt: skip
  """The energy loss of N samples against the posterior; see `energy_score`."""
  sample_key, target_key = jax.random.split(key)
  sample_NPZ = head.sample(params, hidden_PD, sample_key, settings.samples)
  mean_PZ, log_std_PZ = posterior
  attraction_P = TARGETS[settings.targets](
    target_key, sample_NPZ, mean_PZ, jnp.exp(log_std_PZ), settings
  )
  energy_P, repulsion_P = energy_score.energy_loss(sample_NPZ, attraction_P, settings.alpha)
  return energy_P, {"attraction": attraction_P, "repulsion": repulsion_P}


def _drawn(key, sample_NPZ, mean_PZ, std_PZ, settings: config.CalmLoss) -> jax.Array:
  count = settings.posterior_draws
  return energy_score.drawn_attraction(key, sample_NPZ, mean_PZ, std_PZ, count, settings.alpha)


def _expected(key, sample_NPZ, mean_PZ, std_PZ, settings: config.CalmLoss) -> jax.Array:
  return energy_score.expected_attraction(sample_NPZ, mean_PZ, std_PZ, settings.alpha)


# How samples are compared with the posterior, by `settings.targets`.
TARGETS: dict[str, Callable[..., jax.Array]] = {"draws": _drawn, "exact": _expected}


def _flow(
  head: flow_head.FlowHead, params: Params, hidden_PD: jax.Array, posterior: Posterior,
  key: jax.Array, settings: config.CalmLoss,
) -> tuple[jax.Array, Figures]:  # fmt: skip
  """The flow-matching loss, mean over N times, starts and targets a patch."""
  time_key, start_key, target_key = jax.random.split(key, 3)
  z_NPZ = calm.posterior_draws(target_key, *posterior, settings.samples)
  start_NPZ = jax.random.normal(start_key, z_NPZ.shape)
  t_NP = jax.random.uniform(time_key, z_NPZ.shape[:-1])
  x_NPZ = flow_matching.between(t_NP, start_NPZ, z_NPZ)
  velocity_NPZ = head.velocity(params, x_NPZ, hidden_PD, t_NP)
  loss_NP = flow_matching.flow_matching_loss(velocity_NPZ, start_NPZ, z_NPZ)
  return jnp.mean(loss_NP, axis=0), {}


def _diffusion(
  head: diffusion_head.DiffusionHead, params: Params, hidden_PD: jax.Array,
  posterior: Posterior, key: jax.Array, settings: config.CalmLoss,
) -> tuple[jax.Array, Figures]:  # fmt: skip
  """Noise MSE and variational term, mean over N levels, noises and targets a patch."""
  level_key, noise_key, target_key = jax.random.split(key, 3)
  levels = diffusion_head.Levels.evenly(diffusion_head.LEVELS)
  z_NPZ = calm.posterior_draws(target_key, *posterior, settings.samples)
  noise_NPZ = jax.random.normal(noise_key, z_NPZ.shape)
  level_NP = jax.random.randint(level_key, z_NPZ.shape[:-1], 0, diffusion_head.LEVELS)
  x_NPZ = diffusion_head.noised(levels, z_NPZ, level_NP, noise_NPZ)
  prediction = layers.apply(head.network, params, x_NPZ, hidden_PD, level_NP)
  error_NP = diffusion.mean_squared_error(prediction, noise_NPZ)
  bound_NP = diffusion.variational_term(levels, prediction, z_NPZ, x_NPZ, level_NP)
  error_P, bound_P = jnp.mean(error_NP, axis=0), jnp.mean(bound_NP, axis=0)
  return error_P + bound_P, {"noise_mse": error_P, "variational": bound_P}


# The rows are those of `models.heads.HEADS`.
LOSSES: dict[str, Callable[..., tuple[jax.Array, Figures]]] = {
  "energy": _energy,
  "flow": _flow,
  "diffusion": _diffusion,
}
