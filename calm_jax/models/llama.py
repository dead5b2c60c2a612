"""Vectors at positions -> hidden: Llama's layers, shared by the backbone and the baseline."""

from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import attention, layers, memory, remat
from calm_jax.parallel import mesh


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
  attend to what it lets them see, and what they add to it comes back.
  """

  sizes: config.Transformer
  dtype: jnp.dtype
  execution: config.Execution

  @nn.compact
  def __call__(self, x_BPD, position_P, known: memory.Memory | None, layer: Any):
    sizes = self.sizes
    channels = sizes.width // sizes.heads
    batch, positions, _ = x_BPD.shape

    def project(name, heads):
      y = layers.linear(name, heads * channels, "reference", self.dtype, bias=False)(x_BPD)
      return y.reshape(batch, positions, heads, channels)

    def turned(name, heads):
      return remat.named(rotate(project(name, heads), position_P, sizes.rope_theta), name)

    query_BPHC, key_BPGC = turned("query", sizes.heads), turned("key", sizes.kv_heads)
    value_BPGC = remat.named(project("value", sizes.kv_heads), "value")
    written = None
    if known is not None:
      y_BPHC, written = known.attend(layer, query_BPHC, key_BPGC, value_BPGC)
    elif self.is_initializing():
      y_BPHC = query_BPHC
    else:
      kind = attention.choose(self.execution.attention, positions, self.dtype)
      y_BPHC = attention.causal(query_BPHC, key_BPGC, value_BPGC, kind)
    y_BPD = remat.named(y_BPHC.reshape(x_BPD.shape), "attention")
    return layers.linear("out", sizes.width, "reference", self.dtype, bias=False)(y_BPD), written


class Layer(nn.Module):
  """One Llama layer."""

  sizes: config.Transformer
  dtype: jnp.dtype
  execution: config.Execution

  @nn.compact
  def __call__(self, x_BPD, position_P, known, layer):
    y_BPD = layers.rms_norm("attention_norm", self.dtype)(x_BPD)
    attending = Attention(self.sizes, self.dtype, self.execution, name="attention")
    y_BPD, written = attending(y_BPD, position_P, known, layer)
    x_BPD = mesh.constrain(x_BPD + y_BPD, "batch", "position", None)
    y_BPD = layers.rms_norm("mlp_norm", self.dtype)(x_BPD)
    mlp = layers.SwiGLU(self.sizes.ffn, "reference", self.dtype, name="mlp")
    x_BPD = x_BPD + remat.named(mlp(y_BPD), "mlp")
    return mesh.constrain(x_BPD, "batch", "position", None), written


class Llama(nn.Module):
  """The layers and the norm after the last.

  Parameters and memory of all layers are stacked, [L, ...], and a loop works
  through them, so that the program does not grow with their number.
  """

  sizes: config.Transformer
  dtype: jnp.dtype
  execution: config.Execution = config.Execution()

  @nn.compact
  def __call__(self, x_BPD, known: memory.Memory | None):
    """Returns hidden states [B, P, D] and the memory with the P positions in it.

    P must not exceed the free slots of a `Cache` unless P is 1: a longer prefill
    would overwrite positions that its first rows still attend to.
    """
    # As each layer leaves it: where the two differed, XLA's partitioner computed wrong numbers.
    x_BPD = mesh.constrain(x_BPD, "batch", "position", None)
    count = x_BPD.shape[1]
    position_P = jnp.arange(count) if known is None else known.positions(count)
    held, shared = (None, None) if known is None else (known.layers, known._replace(layers=None))
    body = remat.wrapped(Layer, self.execution.remat, in_scan=not self.execution.unroll)
    in_axes: Any = (nn.broadcast, nn.broadcast, 0)
    every_layer = nn.scan(
      body,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=in_axes,
      length=self.sizes.layers,
      unroll=self.sizes.layers if self.execution.unroll else 1,
    )(self.sizes, self.dtype, self.execution, name="layers")
    x_BPD, written = every_layer(x_BPD, position_P, shared, held)
    x_BPD = layers.rms_norm("norm", self.dtype)(x_BPD)
    return x_BPD, None if known is None else known.advanced(written, count)
