"""Trained weights -> what they are kept as while writing: one row a kind."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp

from calm_jax import workdir

LanguageModel = workdir.TrainedCalm | workdir.TrainedTransformer


def _cast(params: Any) -> Any:
  return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def _bfloat16(trained: LanguageModel) -> LanguageModel:
  """Half the memory. Where the model computes in bfloat16, the same numbers."""
  if isinstance(trained, workdir.TrainedTransformer):
    return dataclasses.replace(trained, params=_cast(trained.params))
  codec = dataclasses.replace(trained.autoencoder, params=_cast(trained.autoencoder.params))
  return dataclasses.replace(trained, params=_cast(trained.params), autoencoder=codec)


WEIGHTS: dict[str, Callable[[LanguageModel], LanguageModel]] = {
  "float32": lambda trained: trained,
  "bfloat16": _bfloat16,
}
