"""AdamW as in the paper, and learning-rate schedules, one row of SCHEDULES each."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import numpy as jnp

from calm_jax import config, errors

Schedule = Callable[[jax.Array], jax.Array]


def _constant(settings: config.Optimizer, steps: int, step: jax.Array) -> jax.Array:
  return jnp.float32(1.0)


def _cosine(settings: config.Optimizer, steps: int, step: jax.Array) -> jax.Array:
  progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
  wave = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
  return settings.final_share + (1 - settings.final_share) * wave


def _warmup_stable_decay(settings: config.Optimizer, steps: int, step: jax.Array) -> jax.Array:
  progress = (step - (steps - settings.decay_steps)) / max(1, settings.decay_steps)
  return 1 - (1 - settings.final_share) * jnp.clip(progress, 0, 1)


# (settings, steps, step) -> share of the peak rate at a step, without warmup.
SCHEDULES = {"constant": _constant, "cosine": _cosine, "wsd": _warmup_stable_decay}


def schedule(settings: config.Optimizer, steps: int) -> Schedule:
  """Returns step -> learning rate: linear warmup times the named schedule.

  The rate is peak / warmup_steps at step 0, and the peak at step warmup_steps − 1.

  Raises:
    CalmError: for an unknown schedule, or if warmup and decay are longer than the run.
  """
  if settings.schedule not in SCHEDULES:
    nearest = config.nearest(settings.schedule, SCHEDULES)
    raise errors.CalmError(f"optimizer.schedule is {settings.schedule!r}: {nearest}")
  if settings.schedule == "wsd" and settings.warmup_steps + settings.decay_steps > steps:
    raise errors.CalmError(
      f"optimizer.warmup_steps + decay_steps = {settings.warmup_steps + settings.decay_steps} "
      f"is more than training.steps = {steps}"
    )

  def rate(step: jax.Array) -> jax.Array:
    warmup = jnp.minimum(1.0, (step + 1) / max(1, settings.warmup_steps))
    return settings.learning_rate * warmup * SCHEDULES[settings.schedule](settings, steps, step)

  return rate


def decay_mask(params: Any) -> Any:
  """Returns a tree of booleans, true for what decays: matrices, not biases and norms."""
  return jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


def transformation(settings: config.Optimizer) -> optax.GradientTransformation:
  """Returns clipping, Adam and decoupled weight decay, without learning rate and sign."""
  return optax.chain(
    optax.clip_by_global_norm(settings.clip_norm),
    optax.scale_by_adam(settings.b1, settings.b2, settings.eps),
    optax.add_decayed_weights(settings.weight_decay, mask=decay_mask),
  )
