"""Vectors at positions -> hidden: the Llama layers of the backbone and the baseline."""

from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import config
from calm_jax.kernels import attention
from calm_jax.models import layers, memory, remat
from calm_jax.parallel import mesh


def rotate(x_BPHC: jax.Array, position_P: jax.Array, theta: float) -> jax.Array:
  """Returns x with rotary position embedding; channel i pairs with i + C/2, as in Hugging Face."""
  half = x_BPHC.shape[-1] // 2
  frequency_c = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_P1c = position_P[:, None, None].astype(jnp.float32) * frequency_c[None, None]
  cos_1P1c, sin_1P1c = jnp.cos(angle_P1c)[None], jnp.sin(angle_P1c)[None]
  a_BPHc, b_BPHc = jnp.split(x_BPHC.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [a_BPHc * cos_1P1c - b_BPHc * sin_1P1c, b_BPHc * cos_1P1c + a_BPHc * sin_1P1c], axis=-1
  )
  return rotated.astype(x_BPHC.dtype)


class Attention(nn.Module):
  """Causal attention over positions, with groups of query heads that share keys and values.

  Without a cache, all P positions attend to each other causally. With a cache, they attend
  to what it makes visible, and the update of the cache is returned with the result.
  """

  sizes: config.Transformer
  dtype: jnp.dtype
  execution: config.Execution

  @nn.compact
  def __call__(self, x_BPD, position_P, cache: memory.Memory | None, layer: Any):
    sizes = self.sizes
    channels = sizes.width // sizes.heads
    batch, positions, _ = x_BPD.shape

    def project(name, heads):
      y = layers.linear(name, heads * channels, "reference", self.dtype, bias=False)(x_BPD)
      return y.reshape(batch, positions, heads, channels)

    def rotated(name, heads):
      return remat.named(rotate(project(name, heads), position_P, sizes.rope_theta), name)

    query_BPHC, key_BPGC = rotated("query", sizes.heads), rotated("key", sizes.kv_heads)
    value_BPGC = remat.named(project("value", sizes.kv_heads), "value")
    update = None
    if cache is not None:
      y_BPHC, update = cache.attend(layer, query_BPHC, key_BPGC, value_BPGC)
    elif self.is_initializing():
      y_BPHC = query_BPHC
    else:
      kind = attention.choose(self.execution.attention, positions, self.dtype)
      y_BPHC = attention.causal(query_BPHC, key_BPGC, value_BPGC, kind)
    y_BPD = remat.named(y_BPHC.reshape(x_BPD.shape), "attention")
    return layers.linear("out", sizes.width, "reference", self.dtype, bias=False)(y_BPD), update


class Layer(nn.Module):
  """One Llama layer: attention, then SwiGLU, each with RMSNorm before it and a residual."""

  sizes: config.Transformer
  dtype: jnp.dtype
  execution: config.Execution

  @nn.compact
  def __call__(self, x_BPD, position_P, cache, layer):
    y_BPD = layers.rms_norm("attention_norm", self.dtype)(x_BPD)
    attend = Attention(self.sizes, self.dtype, self.execution, name="attention")
    y_BPD, update = attend(y_BPD, position_P, cache, layer)
    x_BPD = mesh.constrain(x_BPD + y_BPD, "batch", "position", None)
    y_BPD = layers.rms_norm("mlp_norm", self.dtype)(x_BPD)
    mlp = layers.SwiGLU(self.sizes.ffn, "reference", self.dtype, name="mlp")
    x_BPD = x_BPD + remat.named(mlp(y_BPD), "mlp")
    return mesh.constrain(x_BPD, "batch", "position", None), update


class Llama(nn.Module):
  """All layers, and the norm after the last.

  Parameters and caches of all layers are stacked, [L, ...], and scanned, so that the size of
  the program does not depend on the number of layers.
  """

  sizes: config.Transformer
  dtype: jnp.dtype
  execution: config.Execution = config.Execution()

  @nn.compact
  def __call__(self, x_BPD, cache: memory.Memory | None) -> tuple[jax.Array, memory.Memory | None]:
    """Returns hidden states [B, P, D] and the cache with the P positions in it.

    Unless P is 1, it must not exceed the free slots of a `memory.Cache`: a longer prefill
    would overwrite positions that its first rows still attend to.
    """
    # Sharded as each layer returns it: where the two differ, XLA's partitioner miscomputes.
    x_BPD = mesh.constrain(x_BPD, "batch", "position", None)
    count = x_BPD.shape[1]
    position_P = jnp.arange(count) if cache is None else cache.positions(count)
    per_layer = shared = None
    if cache is not None:
      per_layer, shared = cache.layers, cache._replace(layers=None)
    body = remat.wrapped(Layer, self.execution.remat, in_scan=not self.execution.unroll)
    in_axes: Any = (nn.broadcast, nn.broadcast, 0)
    all_layers = nn.scan(
      body,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=in_axes,
      length=self.sizes.layers,
      unroll=self.sizes.layers if self.execution.unroll else 1,
    )(self.sizes, self.dtype, self.execution, name="layers")
    x_BPD, update = all_layers(x_BPD, position_P, shared, per_layer)
    x_BPD = layers.rms_norm("norm", self.dtype)(x_BPD)
    return x_BPD, None if cache is None else cache.advanced(update, count)
