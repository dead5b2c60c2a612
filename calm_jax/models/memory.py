"""Key-value caches of a Transformer, and the attention of new positions to them."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import layers

# Branches that attend at once: their scores over the complete prefix are in memory.
BRANCH_CHUNK = 512
# Attention scores of a prompt that are in memory at once.
SCORES = 2**26


class LayerCache(NamedTuple):
  """Keys (already rotated) and values of one layer, [B, U, W] each with U = G C.

  Of all layers, stacked: [L, B, U, W]. Laid out as TPU decode loops read it: other layouts
  copy the complete cache before and after the loop, and pad a last axis of 64 channels to 128.
  """

  key_BUW: jax.Array
  value_BUW: jax.Array

  @classmethod
  def of(cls, key_BPGC: jax.Array, value_BPGC: jax.Array) -> "LayerCache":
    """Returns keys and values of P positions in the cache's layout."""
    batch, count = key_BPGC.shape[:2]
    return cls(*(jnp.swapaxes(x.reshape(batch, count, -1), 1, 2) for x in (key_BPGC, value_BPGC)))

  def part(self, key_BPGC: jax.Array, visible: jax.Array) -> "Part":
    """Returns the `Part` that queries attend to, with the groups G of `key_BPGC`."""
    groups, channels = key_BPGC.shape[-2:]
    key_BGCW, value_BGCW = (x.reshape(x.shape[0], groups, channels, -1) for x in self)
    return Part(key_BGCW, value_BGCW, visible)


class Part(NamedTuple):
  """Keys and values that queries attend to, and a mask of those that each query sees.

  Attributes:
    key_BGCW, value_BGCW: of W slots or positions.
    visible: bool, broadcastable to [B, P, W].
  """

  key_BGCW: jax.Array
  value_BGCW: jax.Array
  visible: jax.Array


def _attend(query_BPHC: jax.Array, parts: list[Part]) -> jax.Array:
  """Returns the attention of P queries to all parts, as if they were concatenated: [B, P, H, C]."""
  batch, count, heads, channels = query_BPHC.shape
  groups = parts[0].key_BGCW.shape[1]
  query_BPGhC = query_BPHC.reshape(batch, count, groups, heads // groups, channels)

  def scores(part: Part) -> jax.Array:
    score_BGhPW = jnp.einsum(
      "BPGhC,BGCW->BGhPW", query_BPGhC, part.key_BGCW, preferred_element_type=jnp.float32
    )
    return jnp.where(part.visible[:, None, None], score_BGhPW / channels**0.5, -jnp.inf)

  weight = jax.nn.softmax(jnp.concatenate([scores(part) for part in parts], axis=-1), axis=-1)
  weight, y_BPGhC, first = weight.astype(query_BPHC.dtype), jnp.zeros_like(query_BPGhC), 0
  for part in parts:
    slots = part.key_BGCW.shape[-1]
    weight_BGhPW = weight[..., first : first + slots]
    y_BPGhC += jnp.einsum("BGhPW,BGCW->BPGhC", weight_BGhPW, part.value_BGCW)
    first += slots
  return y_BPGhC.reshape(query_BPHC.shape)


class Cache(NamedTuple):
  """The last positions, in a ring of W slots: slot = position mod W.

  Layers only read the cache. Their updates are written for all layers at once, so that a
  step moves the bytes of one position and not those of the complete cache.

  Attributes:
    layers: all layers, stacked; None before the first position. Attention receives its own
      layer apart from the other fields.
    position_W: the position that each slot holds, -1 where it is empty.
    next_position: the position of the next vector, int32 scalar.
    start_B: the first position of each example; an example sees no position before it.
      Shorter texts of a batch are padded in front. None: all examples start at 0.
    window: the number of positions that a position sees at most, itself included. None: the
      number of slots.
  """

  layers: LayerCache | None
  position_W: jax.Array
  next_position: jax.Array
  start_B: jax.Array | None = None
  window: jax.Array | None = None

  @classmethod
  def empty(
    cls, slots: int, start_B: jax.Array | None = None, window: int | None = None
  ) -> "Cache":
    """Returns a cache without positions. A window must not exceed the slots."""
    window_scalar = None if window is None else jnp.int32(window)
    return cls(None, jnp.full((slots,), -1), jnp.int32(0), start_B, window_scalar)

  def allocated(self, sizes: config.Transformer, batch: int, dtype: jnp.dtype) -> "Cache":
    """Returns the cache with zero arrays, for callers that need their shapes."""
    slots = self.position_W.shape[0]
    shape = (sizes.layers, batch, sizes.width // sizes.heads * sizes.kv_heads, slots)
    return self._replace(layers=LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))

  def positions(self, count: int) -> jax.Array:
    """Returns the positions of the next `count` (P) vectors, int [P]."""
    return jnp.arange(count) + self.next_position

  def attend(
    self,
    layer: LayerCache | None,
    query_BPHC: jax.Array,
    key_BPGC: jax.Array,
    value_BPGC: jax.Array,
  ) -> tuple[jax.Array, LayerCache]:
    """Returns the attention of P new positions to a layer and to each other, and the update.

    Args:
      layer: the layer of `layers` that attends; None before the first position.
    """
    batch, count = query_BPHC.shape[:2]
    window = self.position_W.shape[0] if self.window is None else self.window
    position_P = self.positions(count)
    start_B = jnp.zeros((batch,), jnp.int32) if self.start_B is None else self.start_B

    def visible(position_W: jax.Array, start_B: jax.Array) -> jax.Array:
      """Mask of positions that are in the window of a query, its own included: [B, P, W]."""
      age_PW = position_P[:, None] - position_W[None]
      started_BW = position_W[None] >= start_B[:, None]
      # Positions before an example's start see themselves: a softmax over nothing is NaN.
      return ((age_PW >= 0) & (age_PW < window))[None] & (started_BW[:, None] | (age_PW == 0)[None])

    update = LayerCache.of(key_BPGC, value_BPGC)
    if layer is not None:
      mask_BPW = visible(self.position_W, start_B) & (self.position_W >= 0)[None, None]
      own = update.part(key_BPGC, visible(position_P, start_B))
      return _attend(query_BPHC, [layer.part(key_BPGC, mask_BPW), own]), update

    def attend_examples(examples):
      query_BPHC, own, start_B = examples
      return _attend(query_BPHC, [own.part(key_BPGC, visible(position_P, start_B))])

    chunk = max(1, SCORES // (query_BPHC.shape[2] * count * count))
    examples = (query_BPHC, update, start_B)
    if chunk >= batch:
      return attend_examples(examples), update
    return layers.in_chunks(attend_examples, examples, chunk), update

  def advanced(self, update: Any, count: int) -> "Cache":
    """Returns the cache with the updates [L, B, U, P] of all layers at `count` (P) positions."""
    stacked = self.layers
    if stacked is None:
      depth, batch, width, _ = update.key_BUW.shape
      shape = (depth, batch, width, self.position_W.shape[0])
      stacked = LayerCache(*(jnp.zeros(shape, x.dtype) for x in update))
    stacked = LayerCache(
      *(self._with(old, new, 3) for old, new in zip(stacked, update, strict=True))
    )
    position_W = self._with(self.position_W, self.positions(count), 0)
    return self._replace(
      layers=stacked, position_W=position_W, next_position=self.next_position + count
    )

  def _with(self, old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
    """Returns `old` with `new` in the slots from the next one on.

    New positions never wrap around the ring's end: there is one, or they have free slots.
    (A scatter would do, but libtpu 0.0.52 aborts on it over several devices.)
    """
    slot = self.next_position % self.position_W.shape[0]
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, axis)


class LayerBranches(NamedTuple):
  """Branches of one layer, or of all layers, stacked as in `LayerCache`.

  Attributes:
    prefix: the text's keys and values, position p in slot p. There may be fewer branches
      (P) than positions (W): they start from the first P.
    key_BPUJ, value_BPUJ: keys and values of the branches' own J positions.
  """

  prefix: LayerCache
  key_BPUJ: jax.Array
  value_BPUJ: jax.Array


class Branches(NamedTuple):
  """One continuation from each position of a text, all at once.

  Branch i continues after positions 0 to i of a prefix that all branches share. Each call
  adds one position to every branch: i + 1, then i + 2, ... The P new vectors of a call
  belong to P branches, not to P successive positions.
  """

  layers: LayerBranches

  @classmethod
  def of(cls, cache: Cache, count: int) -> "Branches":
    """Returns `count` (P) branches without own positions, of a cache that has not wrapped."""
    assert cache.layers is not None  # The text has been read.
    key_LBUW = cache.layers.key_BUW
    depth, batch, width, _ = key_LBUW.shape
    empty = jnp.zeros((depth, batch, count, width, 0), key_LBUW.dtype)
    return cls(LayerBranches(cache.layers, empty, empty))

  def positions(self, count: int) -> jax.Array:
    """Returns the position of each branch's new vector, int [P]."""
    return jnp.arange(count) + 1 + self.layers.key_BPUJ.shape[-1]

  def attend(
    self,
    layer: LayerBranches,
    query_BPHC: jax.Array,
    key_BPGC: jax.Array,
    value_BPGC: jax.Array,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Adds a position to every branch; returns its attention, and the branches' keys and values."""
    batch, count = query_BPHC.shape[:2]
    slots = layer.prefix.key_BUW.shape[-1]
    key_BPUJ, value_BPUJ = (
      jnp.concatenate([old, new.reshape(batch, count, -1, 1)], axis=-1)
      for old, new in ((layer.key_BPUJ, key_BPGC), (layer.value_BPUJ, value_BPGC))
    )

    def attend_branch(branch):
      index, query_BHC, key_BUJ, value_BUJ = branch
      mask_11W = (jnp.arange(slots) <= index)[None, None]
      mask_11J = jnp.ones((1, 1, key_BUJ.shape[-1]), bool)
      own = LayerCache(key_BUJ, value_BUJ)
      parts = [layer.prefix.part(key_BPGC, mask_11W), own.part(key_BPGC, mask_11J)]
      return _attend(query_BHC[:, None], parts)[:, 0]

    arrays = (jnp.moveaxis(x, 1, 0) for x in (query_BPHC, key_BPUJ, value_BPUJ))
    branches = (jnp.arange(count), *arrays)
    chunk = max(1, min(count, BRANCH_CHUNK // batch))
    y_PBHC = jax.lax.map(attend_branch, branches, batch_size=chunk)
    return jnp.moveaxis(y_PBHC, 0, 1), (key_BPUJ, value_BPUJ)

  def advanced(self, update: Any, count: int) -> "Branches":
    """Returns the branches with the keys and values that all layers returned."""
    return Branches(LayerBranches(self.layers.prefix, *update))


Memory = Cache | Branches
