"""Settings -> the stage of a run that has no workdir yet: to plan and to measure."""

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import autoencoder
from calm_jax.training import autoencoder_stage, calm_stage, stages, transformer_stage

Params = Any


def stage(
  run: config.Run,
  codec: config.Autoencoder,
  vocab_size: int,
  make: Callable[[Callable[[jax.Array], Params]], Params],
) -> stages.Stage:
  """Returns the stage; stage two's over an autoencoder of sizes `codec`.

  Args:
    make: gives the autoencoder's parameters, from what makes them of a key.
  """
  if isinstance(run, config.AutoencoderRun):
    return autoencoder_stage.build(run, vocab_size)
  if isinstance(run, config.TransformerRun):
    return transformer_stage.build(run, vocab_size)
  dtype = jnp.dtype(run.training.compute_dtype)
  model = autoencoder.Autoencoder(codec, vocab_size, dtype)
  return calm_stage.build(run, model, make(model.initial), vocab_size)
