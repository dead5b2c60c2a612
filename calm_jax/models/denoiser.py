"""Noised latents, hidden, time -> a prediction: the network of the flow and diffusion heads."""

import math
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import layers, remat
from calm_jax.parallel import mesh

FREQUENCIES, MAX_PERIOD = 128, 10_000.0

_xavier = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros_init()


def sinusoid(time: jax.Array) -> jax.Array:
  """Returns cosines, then sines, of a time in [0, 1000): [...] -> [..., 256] float32."""
  frequency = jnp.exp(-math.log(MAX_PERIOD) * jnp.arange(FREQUENCIES) / FREQUENCIES)
  angle = time.astype(jnp.float32)[..., None] * frequency.reshape((1,) * time.ndim + (-1,))
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _linear(name: str, features: int, dtype: jnp.dtype, init=_xavier) -> nn.Dense:
  return nn.Dense(
    features, dtype=dtype, kernel_init=init, dot_general=layers.dot_general, name=name
  )


def _modulated(x_D: jax.Array, shift_D: jax.Array, scale_D: jax.Array) -> jax.Array:
  return x_D * (1 + scale_D) + shift_D


class Block(nn.Module):
  """x + gate · MLP(modulated LayerNorm(x)): [..., D], [..., D] -> [..., D]."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_D, state_D):
    width = x_D.shape[-1]
    modulation = _linear("modulation", 3 * width, self.dtype, _zeros)(nn.silu(state_D))
    shift_D, scale_D, gate_D = jnp.split(modulation, 3, axis=-1)
    y_D = _modulated(layers.layer_norm("norm", self.dtype)(x_D), shift_D, scale_D)
    y_D = mesh.constrain_last(_linear("up", width, self.dtype)(y_D), "position", "width")
    return x_D + gate_D * _linear("down", width, self.dtype)(nn.silu(y_D))


class Denoiser(nn.Module):
  """The MLP with adaptive layer norm that both iterative heads train.

  Its initial values are Xavier's, zero in the modulations and the last layer,
  and 0.02 in the time embedding, whatever the backbone's are.

  Source: CALM (arXiv:2510.27688), appendix, after MAR's diffusion head.
  """

  sizes: config.Head
  width: int
  outputs: int
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"

  def setup(self):
    normal = nn.initializers.normal(0.02)
    self.latent_in = _linear("latent_in", self.width, self.dtype)
    self.hidden_in = _linear("hidden_in", self.width, self.dtype)
    self.time_in = _linear("time_in", self.width, self.dtype, normal)
    self.time_out = _linear("time_out", self.width, self.dtype, normal)
    block = remat.wrapped(Block, self.remat)
    self.blocks = [block(self.dtype, name=f"block_{i}") for i in range(self.sizes.blocks)]
    self.norm = nn.LayerNorm(epsilon=layers.EPS, use_bias=False, use_scale=False, dtype=self.dtype)
    self.modulation = _linear("modulation", 2 * self.width, self.dtype, _zeros)
    self.out = _linear("out", self.outputs, self.dtype, _zeros)

  def condition(self, hidden_D: jax.Array) -> jax.Array:
    """Returns what all samples and times share of a hidden state: [..., D]."""
    return self.hidden_in(hidden_D)

  def predict(self, x_NZ: jax.Array, condition_D: jax.Array, time_N: jax.Array) -> jax.Array:
    """Returns the prediction at N noised latents, [N, ..., outputs] float32.

    Args:
      x_NZ: [N, ..., Z].
      condition_D: [..., D], from `condition`.
      time_N: [N, ...], whole numbers in [0, 1000).
    """
    time_ND = self.time_out(nn.silu(self.time_in(sinusoid(time_N))))
    state_ND = time_ND + condition_D[None]
    state_ND = mesh.constrain_last(state_ND, "position", None)
    x_ND = mesh.constrain_last(self.latent_in(x_NZ), "position", None)
    for block in self.blocks:
      x_ND = mesh.constrain_last(block(x_ND, state_ND), "position", None)
    shift_ND, scale_ND = jnp.split(self.modulation(nn.silu(state_ND)), 2, axis=-1)
    return self.out(_modulated(self.norm(x_ND), shift_ND, scale_ND)).astype(jnp.float32)

  def __call__(self, x_NZ: jax.Array, hidden_D: jax.Array, time_N: jax.Array) -> jax.Array:
    """Returns the prediction for hidden states [..., D]; creates every parameter."""
    return self.predict(x_NZ, self.condition(hidden_D), time_N)


def init(network: Denoiser, key: jax.Array, latent: int) -> Any:
  """Returns initial parameters of a network over latents of a size, float32."""
  x_1Z, time_1 = jnp.zeros((1, latent)), jnp.zeros((1,))
  return network.init(key, x_1Z, jnp.zeros((network.width,)), time_1)["params"]
