"""What a Transformer remembers between calls, and how new positions attend to it."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from calm_jax import config

# Branches that attend at once: their scores over the whole prefix are in memory.
BRANCH_CHUNK = 512


class LayerCache(NamedTuple):
  """Keys, rotated already, and values of one layer: [B, W, G, C] each; of all, [L, B, W, G, C]."""

  key_BWGC: jax.Array
  value_BWGC: jax.Array


class Cache(NamedTuple):
  """The last W positions as a ring: slot = position mod W.

  Attributes:
    layers: of all layers, stacked. Attention gets its own layer beside the rest.
    position_W: the position that each slot holds, -1 where it is empty.
    next_position: the position that comes next, int32 scalar.
  """

  layers: LayerCache
  position_W: jax.Array
  next_position: jax.Array

  @classmethod
  def empty(cls, sizes: config.Transformer, batch: int, window: int, dtype: jnp.dtype) -> "Cache":
    """Returns a cache without a position, of `window` slots."""
    shape = (sizes.layers, batch, window, sizes.kv_heads, sizes.width // sizes.heads)
    layers = LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    return cls(layers, jnp.full((window,), -1), jnp.int32(0))

  def positions(self, count: int) -> jax.Array:
    """Returns the positions of `count` new ones, int [P]."""
    return jnp.arange(count) + self.next_position

  def attend(self, layer: LayerCache, query_BPHC, key_BPGC, value_BPGC):
    """Writes P new positions into a layer; returns what they read of it, and the layer."""
    position_P = self.positions(query_BPHC.shape[1])
    cache = LayerCache(
      self._with(layer.key_BWGC, key_BPGC, axis=1), self._with(layer.value_BWGC, value_BPGC, axis=1)
    )
    held_W = self._with(self.position_W, position_P, axis=0)
    visible_PW = (held_W[None] >= 0) & (held_W[None] <= position_P[:, None])
    y_BPHC = jax.nn.dot_product_attention(query_BPHC, *cache, mask=visible_PW[None, None])
    return y_BPHC, cache

  def advanced(self, written: Any, count: int) -> "Cache":
    """Returns the cache after `count` positions, from the layers with them in."""
    held_W = self._with(self.position_W, self.positions(count), axis=0)
    return Cache(written, held_W, self.next_position + count)

  def _with(self, held: jax.Array, new: jax.Array, axis: int) -> jax.Array:
    """Returns `held` with what is new in the slots from the next one on.

    New positions never go round the ring's end: they are one, or have free slots. (A
    scatter would do, but libtpu 0.0.52 aborts on it over several devices.)
    """
    slot = self.next_position % self.position_W.shape[0]
    return jax.lax.dynamic_update_slice_in_dim(held, new.astype(held.dtype), slot, axis)


class LayerBranches(NamedTuple):
  """Of one layer, or of all, stacked as in `LayerCache`.

  Attributes:
    prefix: the text's keys and values, position p in slot p. P branches may be fewer
      than its W positions: they are the first P.
    key_BPJGC, value_BPJGC: those of the branches' own J positions.
  """

  prefix: LayerCache
  key_BPJGC: jax.Array
  value_BPJGC: jax.Array


class Branches(NamedTuple):
  """One continuation from each position of a text, all at once.

  Branch i goes on after positions 0 to i of a prefix that all branches share; of
  its own positions i + 1, i + 2, ... each call adds one. The P new vectors of a
  call belong to P branches, not to P positions in a row.
  """

  layers: LayerBranches

  @classmethod
  def of(cls, cache: Cache, count: int) -> "Branches":
    """Returns `count` branches, nothing added yet, of a cache that has not wrapped."""
    key_LBWGC = cache.layers.key_BWGC
    layers, batch, _, groups, channels = key_LBWGC.shape
    nothing = jnp.zeros((layers, batch, count, 0, groups, channels), key_LBWGC.dtype)
    return cls(LayerBranches(cache.layers, nothing, nothing))

  def positions(self, count: int) -> jax.Array:
    """Returns the position of each branch's new vector, int [P]."""
    return jnp.arange(count) + 1 + self.layers.key_BPJGC.shape[3]

  def attend(self, layer: LayerBranches, query_BPHC, key_BPGC, value_BPGC):
    """Adds one position to every branch; returns what it reads, and the branches' own."""
    prefix = layer.prefix
    key_BPJGC = jnp.concatenate([layer.key_BPJGC, key_BPGC[:, :, None]], axis=2)
    value_BPJGC = jnp.concatenate([layer.value_BPJGC, value_BPGC[:, :, None]], axis=2)
    batch, count, heads, channels = query_BPHC.shape
    groups, slots = key_BPGC.shape[2], prefix.key_BWGC.shape[1]

    def one(branch):
      index, query_BHC, key_BJGC, value_BJGC = branch
      query_BGhC = query_BHC.reshape(batch, groups, heads // groups, channels)
      score_BGhW = jnp.einsum(
        "BGhC,BWGC->BGhW", query_BGhC, prefix.key_BWGC, preferred_element_type=jnp.float32
      )
      score_BGhW = jnp.where((jnp.arange(slots) <= index)[None, None, None], score_BGhW, -jnp.inf)
      score_BGhJ = jnp.einsum(
        "BGhC,BJGC->BGhJ", query_BGhC, key_BJGC, preferred_element_type=jnp.float32
      )
      score = jnp.concatenate([score_BGhW, score_BGhJ], axis=-1) / channels**0.5
      weight = jax.nn.softmax(score, axis=-1).astype(query_BHC.dtype)
      y_BGhC = jnp.einsum("BGhW,BWGC->BGhC", weight[..., :slots], prefix.value_BWGC)
      y_BGhC += jnp.einsum("BGhJ,BJGC->BGhC", weight[..., slots:], value_BJGC)
      return y_BGhC.reshape(batch, heads, channels)

    branches = (jnp.arange(count), *(jnp.moveaxis(x, 1, 0) for x in (
      query_BPHC, key_BPJGC, value_BPJGC
    )))  # fmt: skip
    y_PBHC = jax.lax.map(one, branches, batch_size=max(1, min(count, BRANCH_CHUNK // batch)))
    return jnp.moveaxis(y_PBHC, 0, 1), (key_BPJGC, value_BPJGC)

  def advanced(self, written: Any, count: int) -> "Branches":
    """Returns the branches with the position that was written, keys and values."""
    return Branches(LayerBranches(self.layers.prefix, *written))


Memory = Cache | Branches
