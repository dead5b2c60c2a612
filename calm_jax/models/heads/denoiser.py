"""Noised latents, hidden, time -> a prediction: what the flow and diffusion heads share."""

import math
from typing import ClassVar

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import config
from calm_jax.kernels import dense
from calm_jax.models import foreign, layers, remat
from calm_jax.models.heads import head
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
  return nn.Dense(features, dtype=dtype, kernel_init=init, dot_general=dense.dot_general, name=name)


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
    y_D = mesh.constrain(_linear("up", width, self.dtype)(y_D), "position", "width")
    return x_D + gate_D * _linear("down", width, self.dtype)(nn.silu(y_D))


class Denoiser(nn.Module):
  """The MLP with adaptive layer norm that both iterative heads train.

  Initial values do not depend on the backbone's: Xavier, zero in the modulations and the
  last layer, and std 0.02 in the time embedding.

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
    """Returns what all samples and times of a hidden state share: [..., D]."""
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
    state_ND = mesh.constrain(state_ND, "position", None)
    x_ND = mesh.constrain(self.latent_in(x_NZ), "position", None)
    for block in self.blocks:
      x_ND = mesh.constrain(block(x_ND, state_ND), "position", None)
    shift_ND, scale_ND = jnp.split(self.modulation(nn.silu(state_ND)), 2, axis=-1)
    return self.out(_modulated(self.norm(x_ND), shift_ND, scale_ND)).astype(jnp.float32)

  def __call__(self, x_NZ: jax.Array, hidden_D: jax.Array, time_N: jax.Array) -> jax.Array:
    """Returns the prediction for hidden states [..., D]; creates every parameter."""
    return self.predict(x_NZ, self.condition(hidden_D), time_N)


class DenoiserHead(head.Head):
  """A head that calls a Denoiser several times per sample.

  Attributes:
    outputs: numbers that the network predicts per dimension of the latent.
    published_steps: sampling steps where `config.Head.steps` is 0.
    calls: calls of the network per sampling step.
  """

  outputs: ClassVar[int] = 1
  published_steps: ClassVar[int]
  calls: ClassVar[int] = 1

  def __init__(self, sizes: config.Head, trunk: head.Trunk):
    outputs = self.outputs * trunk.latent
    self.network = Denoiser(sizes, trunk.width, outputs, trunk.dtype, trunk.remat)
    self.width, self.latent = trunk.width, trunk.latent
    self.steps = self._steps(sizes)
    self.noise_shape = (trunk.latent,)

  @classmethod
  def _steps(cls, sizes: config.Head) -> int:
    return sizes.steps or cls.published_steps

  def init(self, key: jax.Array) -> head.Params:
    """Returns initial parameters, float32, with which every prediction is zero."""
    x_1Z, time_1 = jnp.zeros((1, self.latent)), jnp.zeros((1,))
    return self.network.init(key, x_1Z, jnp.zeros((self.width,)), time_1)["params"]

  def draw_noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns standard normal noise [*shape, *noise_shape]."""
    return jax.random.normal(key, (*shape, *self.noise_shape))

  def condition(self, params: head.Params, hidden_D: jax.Array) -> jax.Array:
    """Returns what all samples of hidden states [..., D] share: [..., D]."""
    return layers.apply(self.network, params, hidden_D, method="condition")

  @classmethod
  def train_flops(cls, sizes: config.Head, width: int, latent: int) -> int:
    """Forward FLOPs of one training sample of a patch: one call of the network."""
    block = 2 * width * (3 * width + width + width)
    condition = 2 * width * (width + 2 * FREQUENCIES + width)
    ends = 2 * width * (latent + 2 * width + cls.outputs * latent)
    return sizes.blocks * block + condition + ends

  @classmethod
  def sampling_flops(cls, sizes: config.Head, width: int, latent: int) -> tuple[int, int]:
    """Forward FLOPs of sampling: once per hidden state, and per sample."""
    shared = 2 * width * width
    per_call = cls.train_flops(sizes, width, latent) - shared
    return shared, cls._steps(sizes) * cls.calls * per_call

  @classmethod
  def tensors(cls, sizes: config.Head) -> list[foreign.Tensor]:
    """Returns the head's tensors under the reference's names."""
    linear, name = foreign.linear, "generative_head.net"
    result = linear(f"{name}.cond_embed", "head/hidden_in")
    result += linear(f"{name}.input_proj", "head/latent_in")
    result += linear(f"{name}.time_embed.mlp.0", "head/time_in")
    result += linear(f"{name}.time_embed.mlp.2", "head/time_out")
    for i in range(sizes.blocks):
      block, path = f"{name}.res_blocks.{i}", f"head/block_{i}"
      result += foreign.norm(f"{block}.in_ln", f"{path}/norm", bias=True)
      result += linear(f"{block}.adaLN_modulation.1", f"{path}/modulation")
      result += linear(f"{block}.mlp.0", f"{path}/up") + linear(f"{block}.mlp.2", f"{path}/down")
    result += linear(f"{name}.final_layer.adaLN_modulation.1", "head/modulation")
    return result + linear(f"{name}.final_layer.linear", "head/out")

  @classmethod
  def recognize(cls, folder: foreign.Folder, latent: int) -> dict[str, int] | None:
    """Returns the head's settings in a folder of the reference, None if it holds another head.

    The heads that share the network differ in the rows of its last layer.
    """
    out = "generative_head.net.final_layer.linear.weight"
    if out not in folder.tensors:
      return None
    rows = folder.matrix(out)[1].shape[0]
    if rows != cls.outputs * latent:
      return None
    blocks, settings = folder.count("generative_head.net.res_blocks"), folder.settings
    settings.require(num_mlp_layers=blocks)
    steps = settings.whole("sampling_steps", 0) if settings.has("sampling_steps") else 0
    return {"blocks": blocks, "steps": steps}
