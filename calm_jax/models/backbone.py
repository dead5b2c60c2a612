"""Patches -> hidden: the input projection and the Llama Transformer over patches."""

from typing import NamedTuple

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import layers


class LayerCache(NamedTuple):
  """Keys and values of the last W patches of one layer, as a ring: slot = position mod W."""

  key_BWGC: jax.Array  # Rotated already.
  value_BWGC: jax.Array


class Cache(NamedTuple):
  """What a decoder keeps between patches.

  Attributes:
    layers: one LayerCache a layer.
    position_W: the patch position that each slot holds, -1 where it is empty.
    next_position: the position of the next patch, int32 scalar.
  """

  layers: tuple[LayerCache, ...]
  position_W: jax.Array
  next_position: jax.Array


def empty_cache(sizes: config.Backbone, batch: int, window: int, dtype: jnp.dtype) -> Cache:
  """Returns a cache without a patch, of `window` slots."""
  shape = (batch, window, sizes.kv_heads, sizes.width // sizes.heads)
  empty = LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
  return Cache((empty,) * sizes.layers, jnp.full((window,), -1), jnp.int32(0))


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
  """Causal attention over patches, query heads in groups that share keys and values.

  Without a cache all P patches attend to each other causally. With one, the P new
  patches are written into it first and attend to whatever it holds.
  """

  sizes: config.Backbone
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BPD, position_P, cache: LayerCache | None, held_W):
    sizes = self.sizes
    channels = sizes.width // sizes.heads
    batch, patches, _ = x_BPD.shape

    def project(name, heads):
      y = layers.linear(name, heads * channels, "reference", self.dtype, bias=False)(x_BPD)
      return y.reshape(batch, patches, heads, channels)

    query_BPHC = rotate(project("query", sizes.heads), position_P, sizes.rope_theta)
    key_BPGC = rotate(project("key", sizes.kv_heads), position_P, sizes.rope_theta)
    value_BPGC = project("value", sizes.kv_heads)
    if cache is None:
      y_BPHC = jax.nn.dot_product_attention(query_BPHC, key_BPGC, value_BPGC, is_causal=True)
    else:
      slot_P = position_P % held_W.shape[0]
      cache = LayerCache(
        cache.key_BWGC.at[:, slot_P].set(key_BPGC), cache.value_BWGC.at[:, slot_P].set(value_BPGC)
      )
      visible_PW = (held_W[None] >= 0) & (held_W[None] <= position_P[:, None])
      y_BPHC = jax.nn.dot_product_attention(
        query_BPHC, cache.key_BWGC, cache.value_BWGC, mask=visible_PW[None, None]
      )
    y_BPD = y_BPHC.reshape(x_BPD.shape)
    return layers.linear("out", sizes.width, "reference", self.dtype, bias=False)(y_BPD), cache


class Layer(nn.Module):
  """One Llama layer."""

  sizes: config.Backbone
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BPD, position_P, cache, held_W):
    y_BPD = layers.rms_norm("attention_norm", self.dtype)(x_BPD)
    y_BPD, cache = Attention(self.sizes, self.dtype, name="attention")(
      y_BPD, position_P, cache, held_W
    )
    x_BPD = x_BPD + y_BPD
    y_BPD = layers.rms_norm("mlp_norm", self.dtype)(x_BPD)
    mlp = layers.SwiGLU(self.sizes.ffn, "reference", self.dtype, name="mlp")
    return x_BPD + mlp(y_BPD), cache


class InputProjection(nn.Module):
  """The K token embeddings of a patch -> one input vector: [B, P, K, D] -> [B, P, D]."""

  sizes: config.Backbone
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BPKD):
    sizes = self.sizes
    x_BPD = x_BPKD.reshape(*x_BPKD.shape[:2], -1)
    x_BPD = layers.linear("up", 2 * sizes.width, sizes.init, self.dtype)(x_BPD)
    x_BPD = layers.linear("down", sizes.width, sizes.init, self.dtype)(nn.silu(x_BPD))
    return layers.layer_norm("norm", self.dtype)(x_BPD)


class Backbone(nn.Module):
  """Tokens of patches -> hidden states; the one at patch i predicts patch i + 1.

  Source: CALM (arXiv:2510.27688), section 4; the layers are Llama's.
  """

  sizes: config.Backbone
  vocab_size: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, token_BPK: jax.Array, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Returns hidden states [B, P, D] and the cache with the P patches in it.

    With a cache, P must not exceed its free slots unless P is 1: a longer
    prefill would overwrite patches that its first rows still attend to.
    """
    sizes = self.sizes
    embed = nn.Embed(
      self.vocab_size,
      sizes.width,
      dtype=self.dtype,
      embedding_init=layers.embedding_init(sizes.init, sizes.width),
      name="embed",
    )
    x_BPD = InputProjection(sizes, self.dtype, name="input")(embed(token_BPK))
    position_P = jnp.arange(token_BPK.shape[1])
    held_W = None
    if cache is not None:
      position_P += cache.next_position
      held_W = cache.position_W.at[position_P % cache.position_W.shape[0]].set(position_P)
    written = []
    for i in range(sizes.layers):
      layer_cache = None if cache is None else cache.layers[i]
      x_BPD, layer_cache = Layer(sizes, self.dtype, name=f"layer_{i}")(
        x_BPD, position_P, layer_cache, held_W
      )
      written.append(layer_cache)
    x_BPD = layers.rms_norm("norm", self.dtype)(x_BPD)
    if cache is None:
      return x_BPD, None
    assert held_W is not None
    return x_BPD, Cache(tuple(written), held_W, cache.next_position + token_BPK.shape[1])
