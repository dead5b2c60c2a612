"""Token store -> batches: fixed blocks in grain's global shuffle; the position is one integer."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import grain
import numpy as np

from calm_jax import errors
from calm_jax.data import store as store_lib

# Field name -> array with one row per example.
Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Field:
  """One field of an example: the shape of its row and its type."""

  shape: tuple[int, ...]
  dtype: np.dtype


class Source(Protocol):
  """An endless stream of training batches, of which each process reads its own rows.

  `TrainingBatches` reads them from a token store. A stage whose targets come from elsewhere, such
  as from generation, passes its own source. One prefetch thread calls it, up to two batches ahead
  of the training loop. Its computations must stay on this process's devices: collectives between
  processes could start in another order than those of the train steps.

  A batch has the fields of the stage's description. One of them is `index`, the example's number
  in the stream, from which the keys of its noise are derived.
  """

  def __next__(self) -> Batch:
    """Returns this process's rows of the next batch."""
    ...

  def get_state(self) -> dict[str, Any]:
    """Returns the position of the next batch, for JSON; the same on all processes.

    Its `global_next_index` is the number of the next batch's first example: checkpoints are
    checked to hold that of their steps.
    """
    ...

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Moves to a position that `get_state` returned."""
    ...


def fields(context: int) -> dict[str, Field]:
  """Returns the fields of a block of `context` tokens."""
  int32 = np.dtype(np.int32)
  return {"tokens": Field((context,), int32), "index": Field((), int32)}


FEW_BLOCKS = 20  # Figures on fewer blocks are noisy.


def require_heldout(store: store_lib.TokenStore, alternative: str) -> None:
  """Raises CalmError unless the store has a held-out split; the message ends in `alternative`."""
  if not store.num_tokens("heldout"):
    raise errors.CalmError(
      f"the token store {store.path} has no held-out split, as --heldout=0 asks: prepare the text "
      f"with a share, as --heldout=0.02{alternative}"
    )


def few_blocks_warnings(
  store: store_lib.TokenStore, context: int, has_evaluation: bool
) -> list[str]:
  """Returns a warning for each split in use that holds few blocks of `context` tokens."""
  return [
    f"warning: the {split} split of {store.path} holds only {blocks} blocks of {context} tokens, "
    f"fewer than {FEW_BLOCKS}: {effect}; prepare more text{remedy} or shorten --config.data.context"
    for split, is_used, effect, remedy in (
      ("train", True, "training soon memorizes them", ""),
      ("heldout", has_evaluation, "figures on them are noisy", " or a larger --heldout"),
    )
    if is_used and (blocks := store.num_tokens(split) // context) < FEW_BLOCKS
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

  def batch(self, blocks: np.ndarray, index: np.ndarray) -> Batch:
    """Returns the batch of blocks number `blocks`, with example numbers `index`, both int [B]."""
    starts = (blocks * self._context).tolist()
    tokens = self._store.read_rows(self._split, starts, self._context)
    return {"tokens": tokens, "index": index.astype(np.int32)}


class TrainingBatches:
  """Endless batches of the training split, with `fields` of a block; see `Source`.

  Every epoch has its own order. Only `rows` of each batch are read, by default all of them. The
  position is the next batch's first index, whatever the batch size and the
  number of processes.
  """

  def __init__(
    self,
    store: store_lib.TokenStore,
    context: int,
    batch: int,
    seed: int,
    rows: np.ndarray | None = None,
  ):
    self._blocks = Blocks(store, "train", context)
    self._order = grain.MapDataset.range(len(self._blocks)).seed(seed).shuffle().repeat()
    self._batch, self._rows = batch, np.arange(batch) if rows is None else rows
    self._next_index = 0

  def __next__(self) -> Batch:
    positions = self._next_index + self._rows
    blocks = np.array([self._order[int(position)] for position in positions])
    batch = self._blocks.batch(blocks, positions % 2**31)
    self._next_index += self._batch
    return batch

  def get_state(self) -> dict[str, Any]:
    """Returns the position, for JSON."""
    return {"global_next_index": self._next_index}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Moves to a position that `get_state` returned."""
    self._next_index = state["global_next_index"]


def heldout_batches(
  store: store_lib.TokenStore, context: int, batch: int, limit: int, rows: np.ndarray | None = None
) -> Iterator[tuple[Batch, int]]:
  """Yields (batch, number of valid rows) over `limit` held-out blocks; 0 for all.

  Batches have the `fields` of a block. The blocks are spread evenly over the split;
  `index` numbers them. The last batch is filled up with its first block, so that all
  batches have one shape. Only `rows` of each batch are read, by default all of them.
  """
  blocks = Blocks(store, "heldout", context)
  count = min(len(blocks), limit) if limit else len(blocks)
  for start in range(0, count, batch):
    index = start + (np.arange(batch) if rows is None else rows)
    numbers = np.where(index < count, index, start) * len(blocks) // count
    yield blocks.batch(numbers, index), min(batch, count - start)


def heldout_tokens(store: store_lib.TokenStore, context: int, limit: int) -> np.ndarray:
  """Returns the blocks that `heldout_batches` yields, int32 [blocks, S]."""
  parts = heldout_batches(store, context, 64, limit)
  return np.concatenate([batch["tokens"][:rows] for batch, rows in parts])
