"""Vectors at positions -> hidden: Llama's layers, shared by the backbone and the baseline."""

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import layers, memory


def rotate(x_BPHC: jax.Array, position_P: jax.Array, theta: float) -> jax.Array:
  """Returns x with rotary positions, dimension i paired with i + C/2 (Hugging Face's pairing)."""
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
  """Causal attention over positions, query heads in groups that share keys and values.

  Without a memory all P positions attend to each other causally; with one they
  are written into it and attend to what it lets them see.
  """

  sizes: config.Transformer
  number: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BPD, position_P, known: memory.Memory | None):
    sizes = self.sizes
    channels = sizes.width // sizes.heads
    batch, positions, _ = x_BPD.shape

    def project(name, heads):
      y = layers.linear(name, heads * channels, "reference", self.dtype, bias=False)(x_BPD)
      return y.reshape(batch, positions, heads, channels)

    query_BPHC = rotate(project("query", sizes.heads), position_P, sizes.rope_theta)
    key_BPGC = rotate(project("key", sizes.kv_heads), position_P, sizes.rope_theta)
    value_BPGC = project("value", sizes.kv_heads)
    if known is None:
      y_BPHC = jax.nn.dot_product_attention(query_BPHC, key_BPGC, value_BPGC, is_causal=True)
      written = None
    else:
      y_BPHC, written = known.attend(self.number, query_BPHC, key_BPGC, value_BPGC)
    y_BPD = y_BPHC.reshape(x_BPD.shape)
    return layers.linear("out", sizes.width, "reference", self.dtype, bias=False)(y_BPD), written


class Layer(nn.Module):
  """One Llama layer."""

  sizes: config.Transformer
  number: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BPD, position_P, known):
    y_BPD = layers.rms_norm("attention_norm", self.dtype)(x_BPD)
    attention = Attention(self.sizes, self.number, self.dtype, name="attention")
    y_BPD, written = attention(y_BPD, position_P, known)
    x_BPD = x_BPD + y_BPD
    y_BPD = layers.rms_norm("mlp_norm", self.dtype)(x_BPD)
    mlp = layers.SwiGLU(self.sizes.ffn, "reference", self.dtype, name="mlp")
    return x_BPD + mlp(y_BPD), written


class Llama(nn.Module):
  """The layers and the norm after the last."""

  sizes: config.Transformer
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BPD, known: memory.Memory | None):
    """Returns hidden states [B, P, D] and the memory with the P positions in it.

    P must not exceed the free slots of a `Cache` unless P is 1: a longer prefill
    would overwrite positions that its first rows still attend to.
    """
    count = x_BPD.shape[1]
    position_P = jnp.arange(count) if known is None else known.positions(count)
    written = []
    for number in range(self.sizes.layers):
      layer = Layer(self.sizes, number, self.dtype, name=f"layer_{number}")
      x_BPD, layer_memory = layer(x_BPD, position_P, known)
      written.append(layer_memory)
    x_BPD = layers.rms_norm("norm", self.dtype)(x_BPD)
    return x_BPD, None if known is None else known.advanced(written, count)
