"""Hidden, 1/T -> samples: a head that reads the temperature, so that one draw is tempered."""

import copy
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import layers
from calm_jax.models.heads import head as head_lib

# Features of log s: itself, and sines and cosines of its multiples.
FREQUENCIES = (1.0, 2.0, 4.0, 8.0)
WIDTH = 64


def features(power: jax.Array) -> jax.Array:
  """Returns the features of powers s = 1/T, [...] -> [..., 9] float32; all are 0 at s = 1."""
  log_1 = jnp.log(power.astype(jnp.float32))[..., None]
  angle = jnp.concatenate([frequency * log_1 for frequency in FREQUENCIES], axis=-1)
  return jnp.concatenate([log_1, jnp.sin(angle), jnp.cos(angle) - 1], axis=-1)


def embedding_flops(width: int) -> int:
  """Forward FLOPs of embedding one power."""
  return 2 * WIDTH * (1 + 2 * len(FREQUENCIES) + width)


class Embedding(nn.Module):
  """Powers s = 1/T -> what is added to the hidden state, 0 before training: [...] -> [..., D]."""

  width: int
  scheme: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, power: jax.Array) -> jax.Array:
    x = layers.linear("power_in", WIDTH, self.scheme, self.dtype)(features(power))
    zeros = nn.initializers.zeros_init()
    return nn.Dense(self.width, dtype=self.dtype, kernel_init=zeros, name="power_out")(nn.silu(x))


class Tempered:
  """Any head, whose hidden state is moved by an embedding of s = 1/T.

  The parameters are {"head": those of the head, "power": those of the embedding}. With an
  untrained embedding the samples are the head's own, at every temperature.
  """

  def __init__(self, head: head_lib.Head, trunk: head_lib.Trunk):
    self.head = head
    self.embedding = Embedding(trunk.width, trunk.scheme, jnp.dtype(trunk.dtype))

  def initial(self, key: jax.Array) -> head_lib.Params:
    """Returns initial parameters, float32."""
    head_key, power_key = jax.random.split(key)
    return {"head": self.head.init(head_key), "power": self.initial_embedding(power_key)}

  def initial_embedding(self, key: jax.Array) -> head_lib.Params:
    """Returns initial parameters of the embedding alone, float32."""
    return self.embedding.init(key, jnp.ones(()))["params"]

  def mapped(self, function: Callable[[Any], Any]) -> "Tempered":
    """Returns the head with `function` applied to each of its linen modules."""
    result = copy.copy(self)
    result.head = copy.copy(self.head)
    result.head.network = function(self.head.network)
    result.embedding = function(self.embedding)
    return result

  def _moved(self, params: head_lib.Params, hidden_D: jax.Array, power: jax.Array) -> jax.Array:
    return hidden_D + layers.apply(self.embedding, params["power"], power)

  def loss(
    self,
    params: head_lib.Params,
    hidden_PD: jax.Array,
    power_P: jax.Array,
    posterior: head_lib.Posterior,
    key: jax.Array,
    settings: config.CalmLoss,
  ) -> tuple[jax.Array, head_lib.Figures]:
    """Training loss per patch, [P] float32, and figures [P]: the head's own loss.

    Args:
      power_P: s of each patch.
      posterior: mean and log_std, [P, Z] each, of the patch that the draws are compared with.
    """
    moved_PD = self._moved(params, hidden_PD, power_P)
    return self.head.loss(params["head"], moved_PD, posterior, key, settings)

  def condition(self, params: head_lib.Params, hidden_D: jax.Array, power: jax.Array) -> Any:
    """Returns what all samples share, from hidden states [..., D] and powers s [...]: [..., *]."""
    return self.head.condition(params["head"], self._moved(params, hidden_D, power))

  def samples(self, params: head_lib.Params, condition: Any, noise: jax.Array) -> jax.Array:
    """Returns N latents [N, ..., Z] float32; see `head.Head.samples`."""
    return self.head.samples(params["head"], condition, noise)

  def sample(
    self, params: head_lib.Params, hidden_D: jax.Array, power: jax.Array, key: jax.Array, count: int
  ) -> jax.Array:
    """Returns `count` (N) latents [N, ..., Z] float32 of hidden states [..., D] and s [...]."""
    moved_D = self._moved(params, hidden_D, power)
    return self.head.sample(params["head"], moved_D, key, count)
