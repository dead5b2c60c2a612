"""Claims about batches: each block once per epoch, and a position that is one integer."""

import numpy as np
import pytest

from calm_jax import errors
from calm_jax.data import pipeline
from calm_jax.data import store as store_lib


@pytest.fixture(scope="module")
def store(tokens: str) -> store_lib.TokenStore:
  return store_lib.TokenStore.open(tokens)


def take(batches: pipeline.TrainingBatches, count: int) -> list[pipeline.Batch]:
  return [next(batches) for _ in range(count)]


def rows(batches: list[pipeline.Batch], name: str = "tokens") -> list[tuple[int, ...]]:
  return [tuple(np.atleast_1d(row).tolist()) for batch in batches for row in batch[name]]


def test_each_epoch_has_every_block_once_in_its_own_order(store):
  context = 64
  count = store.num_tokens("train") // context
  batches = pipeline.TrainingBatches(store, context, count, seed=0)
  first, second, third = take(batches, 3)
  expected = store.read("train", 0, count * context).reshape(count, context)
  for batch in (first, second, third):
    assert sorted(rows([batch])) == sorted(map(tuple, expected.tolist()))
  assert rows([first]) != rows([second])
  np.testing.assert_array_equal(np.sort(first["index"]), np.arange(count))
  np.testing.assert_array_equal(np.sort(second["index"]), np.arange(count, 2 * count))
  np.testing.assert_array_equal(np.sort(third["index"]), np.arange(2 * count, 3 * count))


def test_restoring_the_position_gives_the_same_batches(store):
  batches = pipeline.TrainingBatches(store, 64, 4, seed=0)
  take(batches, 3)
  state = batches.get_state()
  assert list(state.values()) == [12]
  expected = take(batches, 3)
  again = pipeline.TrainingBatches(store, 64, 4, seed=0)
  again.set_state(state)
  resumed = take(again, 3)
  for name in ("tokens", "index"):
    assert rows(resumed, name) == rows(expected, name)


def test_the_position_is_valid_for_another_batch_size(store):
  batches = pipeline.TrainingBatches(store, 64, 4, seed=0)
  take(batches, 3)
  state, expected = batches.get_state(), take(batches, 2)
  again = pipeline.TrainingBatches(store, 64, 8, seed=0)
  again.set_state(state)
  assert sorted(rows(take(again, 1))) == sorted(rows(expected))


def test_the_seed_determines_the_order(store):
  a, b = (take(pipeline.TrainingBatches(store, 64, 8, seed), 1) for seed in (0, 1))
  assert rows(a) != rows(b)


def test_heldout_blocks_are_in_order_and_padding_does_not_count(store):
  total = store.num_tokens("heldout") // 32
  whole = store.read("heldout", 0, 32 * total).reshape(total, 32)
  parts = list(pipeline.heldout_batches(store, 32, batch=4, limit=0))
  assert sum(count for _, count in parts) == total and total % 4
  assert all(batch["tokens"].shape == (4, 32) for batch, _ in parts)
  valid_rows = np.concatenate([batch["tokens"][:count] for batch, count in parts])
  np.testing.assert_array_equal(valid_rows, whole)


def test_a_limited_number_of_heldout_blocks_is_spread_over_the_split(store):
  total = store.num_tokens("heldout") // 32
  whole = store.read("heldout", 0, 32 * total).reshape(total, 32)
  blocks = pipeline.heldout_tokens(store, 32, 3)
  np.testing.assert_array_equal(blocks, whole[[0, total // 3, 2 * total // 3]])


def test_a_split_shorter_than_a_block_is_refused(store):
  size = store.num_tokens("heldout")
  with pytest.raises(errors.CalmError, match=f"the heldout split of .* holds only {size}"):
    next(pipeline.heldout_batches(store, size + 1, 4, 0))
