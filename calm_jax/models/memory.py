"""What a Transformer remembers between calls, and how new positions attend to it."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import layers

# Branches that attend at once: their scores over the whole prefix are in memory.
BRANCH_CHUNK = 512
# Attention scores of a prompt that are in memory at once.
SCORES = 2**26


class LayerCache(NamedTuple):
  """Keys, rotated already, and values of one layer: [B, U, W] each, U = G C; of all, [L, B, U, W].

  As a TPU's loop over positions wants them: in another order it copied them all before
  and after, and a last axis of 64 channels it fills up to 128.
  """

  key_BUW: jax.Array
  value_BUW: jax.Array

  @classmethod
  def of(cls, key_BPGC: jax.Array, value_BPGC: jax.Array) -> "LayerCache":
    """Returns keys and values of P positions as they are kept."""
    batch, count = key_BPGC.shape[:2]
    return cls(*(jnp.swapaxes(x.reshape(batch, count, -1), 1, 2) for x in (key_BPGC, value_BPGC)))

  def part(self, key_BPGC: jax.Array, visible: jax.Array) -> "Part":
    """Returns what queries attend to, in groups as those of `key_BPGC`."""
    groups, channels = key_BPGC.shape[-2:]
    key_BGCS, value_BGCS = (x.reshape(x.shape[0], groups, channels, -1) for x in self)
    return Part(key_BGCS, value_BGCS, visible)


class Part(NamedTuple):
  """Keys and values that queries attend to, and which of them each query may see.

  Attributes:
    key_BGCS, value_BGCS: of S positions.
    visible: bool, [B, P, S] or what broadcasts to it.
  """

  key_BGCS: jax.Array
  value_BGCS: jax.Array
  visible: jax.Array


def _read(query_BPHC: jax.Array, parts: list[Part]) -> jax.Array:
  """Returns what P queries read of several parts, as if those were one: [B, P, H, C]."""
  batch, count, heads, channels = query_BPHC.shape
  groups = parts[0].key_BGCS.shape[1]
  query_BPGhC = query_BPHC.reshape(batch, count, groups, heads // groups, channels)

  def scores(part: Part) -> jax.Array:
    score_BGhPS = jnp.einsum(
      "BPGhC,BGCS->BGhPS", query_BPGhC, part.key_BGCS, preferred_element_type=jnp.float32
    )
    return jnp.where(part.visible[:, None, None], score_BGhPS / channels**0.5, -jnp.inf)

  weight = jax.nn.softmax(jnp.concatenate([scores(part) for part in parts], axis=-1), axis=-1)
  weight, y_BPGhC, read = weight.astype(query_BPHC.dtype), jnp.zeros_like(query_BPGhC), 0
  for part in parts:
    slots = part.key_BGCS.shape[-1]
    weight_BGhPS = weight[..., read : read + slots]
    y_BPGhC += jnp.einsum("BGhPS,BGCS->BPGhC", weight_BGhPS, part.value_BGCS)
    read += slots
  return y_BPGhC.reshape(query_BPHC.shape)


class Cache(NamedTuple):
  """The last positions, in a ring of W slots: slot = position mod W.

  Layers only read it; what they add is written into all of them at once, so that a
  step of a text moves one position's bytes and not the whole cache's.

  Attributes:
    layers: of all layers, stacked, None before the first position. Attention gets its
      own layer beside the rest.
    position_W: the position that each slot holds, -1 where it is empty.
    next_position: the position that comes next, int32 scalar.
    start_B: the first position of each example, which sees none before it: shorter texts of
      a batch are filled up in front. None: all begin at 0.
    window: positions that one sees at most, itself too. None: as many as there are slots.
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
    """Returns a cache without a position. A window must not exceed the slots."""
    seen = None if window is None else jnp.int32(window)
    return cls(None, jnp.full((slots,), -1), jnp.int32(0), start_B, seen)

  def allocated(self, sizes: config.Transformer, batch: int, dtype: jnp.dtype) -> "Cache":
    """Returns the same cache with its arrays, where what takes it must know their shapes."""
    slots = self.position_W.shape[0]
    shape = (sizes.layers, batch, sizes.width // sizes.heads * sizes.kv_heads, slots)
    return self._replace(layers=LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))

  def positions(self, count: int) -> jax.Array:
    """Returns the positions of `count` new ones, int [P]."""
    return jnp.arange(count) + self.next_position

  def attend(self, layer: LayerCache | None, query_BPHC, key_BPGC, value_BPGC):
    """Returns what P new positions read of a layer and of each other, and what they add to it."""
    batch, count = query_BPHC.shape[:2]
    window = self.position_W.shape[0] if self.window is None else self.window
    position_P = self.positions(count)
    start_B = jnp.zeros((batch,), jnp.int32) if self.start_B is None else self.start_B

    def visible(held_S: jax.Array, start_B: jax.Array) -> jax.Array:
      """Those that a ring still holds once a query's own position is in it."""
      age_PS = position_P[:, None] - held_S[None]
      begun_BS = held_S[None] >= start_B[:, None]
      # Positions before an example's start read themselves: a softmax over nothing is NaN.
      return ((age_PS >= 0) & (age_PS < window))[None] & (begun_BS[:, None] | (age_PS == 0)[None])

    added = LayerCache.of(key_BPGC, value_BPGC)
    if layer is not None:
      seen = visible(self.position_W, start_B) & (self.position_W >= 0)[None, None]
      own = added.part(key_BPGC, visible(position_P, start_B))
      return _read(query_BPHC, [layer.part(key_BPGC, seen), own]), added

    def some(examples):
      query_BPHC, own, start_B = examples
      return _read(query_BPHC, [own.part(key_BPGC, visible(position_P, start_B))])

    at_once = max(1, SCORES // (query_BPHC.shape[2] * count * count))
    read = (query_BPHC, added, start_B)
    return (some(read) if at_once >= batch else layers.in_chunks(some, read, at_once)), added

  def advanced(self, written: Any, count: int) -> "Cache":
    """Returns the cache with what all layers added at `count` positions, [L, B, U, P] each."""
    held = self.layers
    if held is None:
      depth, batch, width, _ = written.key_BUW.shape
      shape = (depth, batch, width, self.position_W.shape[0])
      held = LayerCache(*(jnp.zeros(shape, x.dtype) for x in written))
    held = LayerCache(*(self._with(old, new, 3) for old, new in zip(held, written, strict=True)))
    position_W = self._with(self.position_W, self.positions(count), 0)
    return self._replace(
      layers=held, position_W=position_W, next_position=self.next_position + count
    )

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
    key_BPUJ, value_BPUJ: those of the branches' own J positions.
  """

  prefix: LayerCache
  key_BPUJ: jax.Array
  value_BPUJ: jax.Array


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
    assert cache.layers is not None  # The text has been read.
    key_LBUW = cache.layers.key_BUW
    depth, batch, width, _ = key_LBUW.shape
    nothing = jnp.zeros((depth, batch, count, width, 0), key_LBUW.dtype)
    return cls(LayerBranches(cache.layers, nothing, nothing))

  def positions(self, count: int) -> jax.Array:
    """Returns the position of each branch's new vector, int [P]."""
    return jnp.arange(count) + 1 + self.layers.key_BPUJ.shape[-1]

  def attend(self, layer: LayerBranches, query_BPHC, key_BPGC, value_BPGC):
    """Adds one position to every branch; returns what it reads, and the branches' own."""
    batch, count = query_BPHC.shape[:2]
    slots = layer.prefix.key_BUW.shape[-1]
    key_BPUJ, value_BPUJ = (
      jnp.concatenate([held, new.reshape(batch, count, -1, 1)], axis=-1)
      for held, new in ((layer.key_BPUJ, key_BPGC), (layer.value_BPUJ, value_BPGC))
    )

    def one(branch):
      index, query_BHC, key_BUJ, value_BUJ = branch
      seen_11W = (jnp.arange(slots) <= index)[None, None]
      own_11J = jnp.ones((1, 1, key_BUJ.shape[-1]), bool)
      own = LayerCache(key_BUJ, value_BUJ)
      parts = [layer.prefix.part(key_BPGC, seen_11W), own.part(key_BPGC, own_11J)]
      return _read(query_BHC[:, None], parts)[:, 0]

    branches = (jnp.arange(count), *(jnp.moveaxis(x, 1, 0) for x in (
      query_BPHC, key_BPUJ, value_BPUJ
    )))  # fmt: skip
    y_PBHC = jax.lax.map(one, branches, batch_size=max(1, min(count, BRANCH_CHUNK // batch)))
    return jnp.moveaxis(y_PBHC, 0, 1), (key_BPUJ, value_BPUJ)

  def advanced(self, written: Any, count: int) -> "Branches":
    """Returns the branches with the position that was written, keys and values."""
    return Branches(LayerBranches(self.layers.prefix, *written))


Memory = Cache | Branches
