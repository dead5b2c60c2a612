"""Hidden -> samples: the energy head, one pass a sample, no iteration."""

from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import layers, remat
from calm_jax.parallel import mesh


class Block(nn.Module):
  """x + Linear(SwiGLU-like MLP of [LayerNorm(x), y]): [N, ..., D], [..., D] -> [N, ..., D].

  The first Linear of the paper reads x and the condition y side by side. It is
  held as two matrices, because y is the same for all N samples: its half is
  computed once, by `condition`, not N times.
  """

  width: int
  scheme: str
  dtype: jnp.dtype

  def setup(self):
    def linear(features, **kwargs):
      return layers.linear(None, features, self.scheme, self.dtype, **kwargs)

    self.norm = layers.layer_norm(None, self.dtype)
    self.sample_in = linear(self.width, bias=False, share=0.5)
    self.hidden_in = linear(self.width, share=0.5)
    self.middle = linear(self.width)
    self.gate_up = linear(2 * self.width)
    self.down = linear(self.width)

  def condition(self, y_D: jax.Array) -> jax.Array:
    """Returns what all samples share: [..., D]."""
    return mesh.constrain_last(self.hidden_in(y_D), "position", "width")

  def __call__(self, x_ND: jax.Array, condition_D: jax.Array) -> jax.Array:
    def along(x_ND, axis=None):
      return mesh.constrain_last(x_ND, "position", axis)

    u_ND = self.sample_in(self.norm(x_ND)) + condition_D[None]
    u_ND = along(self.middle(nn.silu(along(u_ND, "width"))))
    gate_ND, up_ND = jnp.split(along(self.gate_up(nn.silu(u_ND)), "width"), 2, axis=-1)
    return along(x_ND + self.down(nn.silu(gate_ND) * up_ND))


def _along(x_ND: jax.Array) -> jax.Array:
  return mesh.constrain_last(x_ND, "position", None)


class Network(nn.Module):
  """Hidden states and noise -> samples, in one pass."""

  sizes: config.Head
  width: int
  latent: int
  scheme: str
  dtype: jnp.dtype
  remat: str

  def setup(self):
    def linear(features):
      return layers.linear(None, features, self.scheme, self.dtype)

    self.noise_in, self.noise_norm = linear(self.width), layers.layer_norm(None, self.dtype)
    self.hidden_in, self.hidden_norm = linear(self.width), layers.layer_norm(None, self.dtype)
    block = remat.wrapped(Block, self.remat)
    self.blocks = [
      block(self.width, self.scheme, self.dtype, name=f"block_{i}")
      for i in range(self.sizes.blocks)
    ]
    self.norm, self.middle = layers.layer_norm(None, self.dtype), linear(self.width)
    zeros = nn.initializers.zeros_init()
    self.out = nn.Dense(
      self.latent, dtype=self.dtype, kernel_init=zeros, dot_general=layers.dot_general
    )

  def condition(self, hidden_D: jax.Array) -> list[jax.Array]:
    """Returns what all samples of a hidden state share, a block each: [..., D]."""
    y_D = self.hidden_norm(_along(self.hidden_in(hidden_D)))
    return [block.condition(y_D) for block in self.blocks]

  def predict(self, condition: list[jax.Array], noise_NR: jax.Array) -> jax.Array:
    """Returns N samples [N, ..., Z] float32, given `condition`."""
    x_ND = self.noise_norm(_along(self.noise_in(noise_NR)))
    for block, condition_D in zip(self.blocks, condition, strict=True):
      x_ND = block(x_ND, condition_D)
    x_ND = nn.silu(_along(self.middle(self.norm(x_ND))))
    return _along(self.out(x_ND)).astype(jnp.float32)

  def __call__(self, hidden_D: jax.Array, noise_NR: jax.Array) -> jax.Array:
    """Returns samples of hidden states [..., D]; creates every parameter."""
    return self.predict(self.condition(hidden_D), noise_NR)


class EnergyHead:
  """Turns uniform noise into samples of the next latent, given the hidden state.

  Source: CALM (arXiv:2510.27688), section 4.3.
  """

  def __init__(
    self, sizes: config.Head, width: int, latent: int, scheme: str,
    dtype: jnp.dtype = jnp.float32, remat: str = "none",
  ):  # fmt: skip
    self.network = Network(sizes, width, latent, scheme, dtype, remat)
    self.width, self.noise_shape = width, (sizes.noise,)

  def init(self, key: jax.Array) -> Any:
    """Returns initial parameters, float32. At the start every sample is zero."""
    noise_1R = jnp.zeros((1, *self.noise_shape))
    return self.network.init(key, jnp.zeros((self.width,)), noise_1R)["params"]

  def draw_noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns uniform noise [*shape, R] in [-0.5, 0.5)."""
    return jax.random.uniform(key, (*shape, *self.noise_shape), minval=-0.5, maxval=0.5)

  def condition(self, params: Any, hidden_D: jax.Array) -> Any:
    """Returns what all samples of hidden states [..., D] share."""
    return layers.apply(self.network, params, hidden_D, method="condition")

  def samples(self, params: Any, condition: Any, noise: jax.Array) -> jax.Array:
    """Returns N latents [N, ..., Z] float32, given `condition` and noise [N, ..., R]."""
    return layers.apply(self.network, params, condition, noise, method="predict")

  def sample(self, params: Any, hidden_D: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """Returns `count` latents [N, ..., Z] float32 for hidden states [..., D]."""
    noise_NR = self.draw_noise(key, (count, *hidden_D.shape[:-1]))
    return self.samples(params, self.condition(params, hidden_D), noise_NR)
