"""Tokens -> batches: fixed blocks in a global shuffle, by grain; the position is one integer."""

from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental

from calm_jax import errors
from calm_jax.data import store as store_lib

Batch = Mapping[str, np.ndarray]


class Blocks:
  """Block i of a split: tokens [i * context, (i + 1) * context), across document ends.

  The reference pads every document of stage one to a multiple of K; here patches
  may straddle documents in both stages, as the language model sees them.
  """

  def __init__(self, store: store_lib.TokenStore, split: str, context: int):
    self._store, self._split, self._context = store, split, context
    self._count = store.num_tokens(split) // context
    if not self._count:
      raise errors.CalmError(
        f"data.context is {context} tokens, but the {split} split of {store.path} holds only "
        f"{store.num_tokens(split)}: prepare more text or shorten the context"
      )

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    start = int(index) * self._context
    return {"tokens": self._store.read(self._split, start, start + self._context)}


class TrainingBatches:
  """Endless batches {"tokens": int32 [B, S], "index": int32 [B]} of the training split.

  `index` counts examples of the whole stream; every epoch is shuffled anew. The
  position is one integer, the next index, whatever the batch size and the number
  of hosts.
  """

  def __init__(self, store: store_lib.TokenStore, context: int, batch: int, seed: int):
    blocks = Blocks(store, "train", context)
    stream = grain.MapDataset.source(blocks).seed(seed).shuffle().repeat()
    stream = stream.map_with_index(lambda i, block: {**block, "index": np.int32(i % 2**31)})
    self._dataset = grain_experimental.ElasticIterator(
      stream,
      batch,
      grain.sharding.NoSharding(),
      read_options=grain.ReadOptions(num_threads=2, prefetch_buffer_size=4 * batch),
    )
    self._iterator = iter(self._dataset)

  def __next__(self) -> Batch:
    return next(self._iterator)

  def get_state(self) -> dict[str, Any]:
    """Returns the position, to be stored as JSON."""
    return self._iterator.get_state()

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a stored position."""
    self._iterator.set_state(dict(state))


def heldout_batches(
  store: store_lib.TokenStore, context: int, batch: int, limit: int
) -> Iterator[tuple[Batch, int]]:
  """Yields (batch, rows that count) over `limit` held-out blocks, 0 for all.

  They come from all over the split; `index` numbers them. The last batch is filled
  up with its first block, so that all have one shape.
  """
  blocks = Blocks(store, "heldout", context)
  count = min(len(blocks), limit) if limit else len(blocks)
  for start in range(0, count, batch):
    rows = np.arange(start, start + batch)
    read = np.where(rows < count, rows, start) * len(blocks) // count
    tokens = np.stack([blocks[i]["tokens"] for i in read])
    yield {"tokens": tokens, "index": rows.astype(np.int32)}, min(batch, count - start)


def heldout_tokens(store: store_lib.TokenStore, context: int, limit: int) -> np.ndarray:
  """Returns the blocks that `heldout_batches` yields, int32 [blocks, S]."""
  parts = heldout_batches(store, context, 64, limit)
  return np.concatenate([batch["tokens"][:rows] for batch, rows in parts])
