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
  computed once, not N times.
  """

  scheme: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_ND, y_D):
    def linear(name, features, **kwargs):
      return layers.linear(name, features, self.scheme, self.dtype, **kwargs)

    def along(x_ND, axis=None):
      return mesh.constrain_last(x_ND, "position", axis)

    width = y_D.shape[-1]
    u_ND = linear("sample_in", width, bias=False, share=0.5)(
      layers.layer_norm("norm", self.dtype)(x_ND)
    )
    u_ND += linear("hidden_in", width, share=0.5)(y_D)[None]
    u_ND = along(linear("middle", width)(nn.silu(along(u_ND, "width"))))
    gate_up_ND = along(linear("gate_up", 2 * width)(nn.silu(u_ND)), "width")
    gate_ND, up_ND = jnp.split(gate_up_ND, 2, axis=-1)
    return along(x_ND + linear("down", width)(nn.silu(gate_ND) * up_ND))


class Network(nn.Module):
  """Hidden states and noise -> samples, in one pass."""

  sizes: config.Head
  latent: int
  scheme: str
  dtype: jnp.dtype
  remat: str

  @nn.compact
  def __call__(self, hidden_D, noise_NR):
    def linear(name, features):
      return layers.linear(name, features, self.scheme, self.dtype)

    def along(x_ND):
      return mesh.constrain_last(x_ND, "position", None)

    width = hidden_D.shape[-1]
    x_ND = layers.layer_norm("noise_norm", self.dtype)(along(linear("noise_in", width)(noise_NR)))
    y_D = layers.layer_norm("hidden_norm", self.dtype)(along(linear("hidden_in", width)(hidden_D)))
    block = remat.wrapped(Block, self.remat)
    for i in range(self.sizes.blocks):
      x_ND = block(self.scheme, self.dtype, name=f"block_{i}")(x_ND, y_D)
    x_ND = layers.layer_norm("norm", self.dtype)(x_ND)
    x_ND = nn.silu(along(linear("middle", width)(x_ND)))
    out = nn.Dense(
      self.latent, dtype=self.dtype, kernel_init=nn.initializers.zeros_init(), name="out"
    )
    return along(out(x_ND)).astype(jnp.float32)


class EnergyHead:
  """Turns uniform noise into samples of the next latent, given the hidden state.

  Source: CALM (arXiv:2510.27688), section 4.3.
  """

  def __init__(
    self, sizes: config.Head, width: int, latent: int, scheme: str,
    dtype: jnp.dtype = jnp.float32, remat: str = "none",
  ):  # fmt: skip
    self.network = Network(sizes, latent, scheme, dtype, remat)
    self.width, self.noise_shape = width, (sizes.noise,)

  def init(self, key: jax.Array) -> Any:
    """Returns initial parameters, float32. At the start every sample is zero."""
    noise_1R = jnp.zeros((1, *self.noise_shape))
    return self.network.init(key, jnp.zeros((self.width,)), noise_1R)["params"]

  def draw_noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns uniform noise [*shape, R] in [-0.5, 0.5)."""
    return jax.random.uniform(key, (*shape, *self.noise_shape), minval=-0.5, maxval=0.5)

  def samples(self, params: Any, hidden_D: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns N latents [N, ..., Z] float32 for hidden states [..., D] and noise [N, ..., R]."""
    return layers.apply(self.network, params, hidden_D, noise)

  def sample(self, params: Any, hidden_D: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """Returns `count` latents [N, ..., Z] float32 for hidden states [..., D]."""
    noise_NR = self.draw_noise(key, (count, *hidden_D.shape[:-1]))
    return self.samples(params, hidden_D, noise_NR)
