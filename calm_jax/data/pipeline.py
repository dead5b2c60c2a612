"""Tokens -> batches: fixed blocks in a global shuffle, by grain; the position is one integer."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from calm_jax import errors
from calm_jax.data import store as store_lib

Batch = Mapping[str, np.ndarray]


FEW_BLOCKS = 20  # Figures on fewer vary much.


def require_heldout(store: store_lib.TokenStore, otherwise: str) -> None:
  """Raises CalmError unless the store has a held-out split; `otherwise` is another way out."""
  if not store.num_tokens("heldout"):
    raise errors.CalmError(
      f"the token store {store.path} has no held-out split, as --heldout=0 asks: prepare the text "
      f"with a share, as --heldout=0.02{otherwise}"
    )


def of_few_blocks(store: store_lib.TokenStore, context: int, evaluates: bool) -> list[str]:
  """Returns a line for each split that is used and holds few blocks of `context` tokens."""
  return [
    f"warning: the {split} split of {store.path} holds only {blocks} blocks of {context} tokens, "
    f"fewer than {FEW_BLOCKS}: {effect}; prepare more text{larger} or shorten --config.data.context"
    for split, used, effect, larger in (
      ("train", True, "they are soon learnt by heart", ""),
      ("heldout", evaluates, "figures on them vary much", " or a larger --heldout"),
    )
    if used and (blocks := store.num_tokens(split) // context) < FEW_BLOCKS
  ]


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


class _Rows:
  """Some rows of every batch of a stream, one after the other, from a position on."""

  def __init__(self, stream: grain.MapDataset, start: int, batch: int, rows: np.ndarray):
    self._stream, self._start, self._batch, self._rows = stream, start, batch, rows

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    number, row = divmod(int(index), len(self._rows))
    found = self._stream[self._start + number * self._batch + int(self._rows[row])]
    assert found is not None
    return found


class TrainingBatches:
  """Endless batches {"tokens": int32 [b, S], "index": int32 [b]} of the training split.

  `index` counts examples of the whole stream; every epoch is shuffled anew. Of each
  batch only `rows`, by default all B, are read. The position is one integer, the next
  batch's first index, whatever the batch size and the number of processes.
  """

  def __init__(
    self,
    store: store_lib.TokenStore,
    context: int,
    batch: int,
    seed: int,
    rows: np.ndarray | None = None,
  ):
    blocks = Blocks(store, "train", context)
    stream = grain.MapDataset.source(blocks).seed(seed).shuffle().repeat()
    self._stream = stream.map_with_index(lambda i, block: {**block, "index": np.int32(i % 2**31)})
    self._batch, self._rows = batch, np.arange(batch) if rows is None else rows
    self._next_index = 0
    self._iterator: Iterator[Batch] | None = None

  def __next__(self) -> Batch:
    if self._iterator is None:
      own = _Rows(self._stream, self._next_index, self._batch, self._rows)
      count = len(self._rows)
      ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4 * count)
      examples = grain.MapDataset.source(own).to_iter_dataset(ahead)
      self._iterator = iter(examples.batch(count))
    batch = next(self._iterator)
    self._next_index += self._batch
    return batch

  def get_state(self) -> dict[str, Any]:
    """Returns the position, to be stored as JSON."""
    return {"global_next_index": self._next_index}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a stored position."""
    self._next_index, self._iterator = state["global_next_index"], None


def heldout_batches(
  store: store_lib.TokenStore, context: int, batch: int, limit: int, rows: np.ndarray | None = None
) -> Iterator[tuple[Batch, int]]:
  """Yields (batch, rows of the whole one that count) over `limit` held-out blocks, 0 for all.

  They come from all over the split; `index` numbers them. The last batch is filled
  up with its first block, so that all have one shape. Of each only `rows` are read.
  """
  blocks = Blocks(store, "heldout", context)
  count = min(len(blocks), limit) if limit else len(blocks)
  for start in range(0, count, batch):
    index = start + (np.arange(batch) if rows is None else rows)
    read = np.where(index < count, index, start) * len(blocks) // count
    tokens = np.stack([blocks[i]["tokens"] for i in read])
    yield {"tokens": tokens, "index": index.astype(np.int32)}, min(batch, count - start)


def heldout_tokens(store: store_lib.TokenStore, context: int, limit: int) -> np.ndarray:
  """Returns the blocks that `heldout_batches` yields, int32 [blocks, S]."""
  parts = heldout_batches(store, context, 64, limit)
  return np.concatenate([batch["tokens"][:rows] for batch, rows in parts])
