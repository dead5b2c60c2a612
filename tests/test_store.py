"""Claims about the token store: what is written is read, at random, anywhere, or an error."""

import concurrent.futures
import dataclasses
import json
import pathlib
import pickle
import shutil

import numpy as np
import pytest

from calm_jax import errors
from calm_jax.data import store as store_lib
from calm_jax.data import tokenizer as tokenizer_lib


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tokenizer_lib.Tokenizer:
  path = tmp_path_factory.mktemp("tokenizer") / "any.model"
  return tokenizer_lib.train(["some text for a tokenizer"] * 3, 280, str(path))


def content(documents: list[np.ndarray], block: int = 3) -> store_lib.Content:
  """Returns documents as a writer gets them: in blocks that end anywhere."""
  tokens = np.concatenate(documents)
  lengths = np.array([len(document) for document in documents])
  return store_lib.Content(
    num_tokens=len(tokens),
    num_documents=len(lengths),
    tokens=(tokens[i : i + block] for i in range(0, len(tokens), block)),
    lengths=(lengths[i : i + block] for i in range(0, len(lengths), block)),
  )


def write(
  path: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer, train: list[np.ndarray], block: int = 3
) -> store_lib.TokenStore:
  contents = {"train": content(train, block), "heldout": content([np.array([7, 0, 1])])}
  return store_lib.write(
    str(path),
    tokenizer,
    contents,
    [store_lib.Source("a.txt", 10, len(train) + 1)],
    appends_eos=True,
    heldout=0.02,
    skipped_lines=0,
  )


@pytest.fixture
def store(tmp_path: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer) -> store_lib.TokenStore:
  return write(tmp_path / "store", tokenizer, [np.arange(5), np.array([9]), np.arange(100, 104)])


def test_every_range_is_read_as_it_was_written(store: store_lib.TokenStore):
  expected = np.array([0, 1, 2, 3, 4, 9, 100, 101, 102, 103])
  for start in range(11):
    for stop in range(start, 11):
      found = store.read("train", start, stop)
      assert found.dtype == np.int32
      np.testing.assert_array_equal(found, expected[start:stop])
  np.testing.assert_array_equal(store.read("heldout", 0, 3), [7, 0, 1])


def test_offsets_are_the_starts_of_documents_and_the_end(store: store_lib.TokenStore):
  found = store.offsets("train")
  assert found.dtype == np.int64
  np.testing.assert_array_equal(found, [0, 5, 6, 10])
  assert (store.manifest.splits["train"].documents, store.num_tokens("train")) == (3, 10)


def test_blocks_and_shards_do_not_show(
  tmp_path: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(store_lib, "_CHUNK", 8)
  monkeypatch.setattr(store_lib, "_SHARD", 32)
  rng = np.random.default_rng(0)
  documents = [rng.integers(0, 280, size) for size in (1, 31, 32, 33, 100, 2, 64)]
  stores = [write(tmp_path / str(n), tokenizer, documents, n) for n in (1, 5, 32, 1000)]
  for store in stores:
    np.testing.assert_array_equal(store.read("train", 0, 263), np.concatenate(documents))
    np.testing.assert_array_equal(store.read("train", 30, 35), np.concatenate(documents)[30:35])
    assert store.hash == stores[0].hash


def test_a_range_that_is_not_there_is_an_error(store: store_lib.TokenStore):
  for start, stop in ((-1, 2), (3, 2), (0, 11)):
    with pytest.raises(ValueError, match=r"train has tokens \[0, 10\)"):
      store.read("train", start, stop)


def test_hash_tells_different_tokens_apart(
  tmp_path: pathlib.Path, store: store_lib.TokenStore, tokenizer: tokenizer_lib.Tokenizer
):
  same = [np.arange(5), np.array([9]), np.arange(100, 104)]
  assert write(tmp_path / "same", tokenizer, same).hash == store.hash
  other_token = [np.arange(5), np.array([8]), np.arange(100, 104)]
  assert write(tmp_path / "token", tokenizer, other_token).hash != store.hash
  other_boundary = [np.arange(5), np.array([9, 100]), np.arange(101, 104)]
  assert write(tmp_path / "boundary", tokenizer, other_boundary).hash != store.hash


def test_reopened_and_pickled_stores_are_the_same(store: store_lib.TokenStore):
  for other in (store_lib.TokenStore.open(store.path), pickle.loads(pickle.dumps(store))):
    assert other.manifest == store.manifest and other.hash == store.hash
    np.testing.assert_array_equal(other.read("train", 3, 8), store.read("train", 3, 8))


def test_threads_read_the_same_as_one(store: store_lib.TokenStore):
  ranges = [(start, start + 3) for start in range(8)] * 20
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda r: store.read("train", *r), ranges))
  for (start, stop), tokens in zip(ranges, found, strict=True):
    np.testing.assert_array_equal(tokens, store.read("train", start, stop))


@pytest.mark.parametrize(("vocab_size", "name"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_tokens_are_stored_in_the_smallest_type(vocab_size: int, name: str):
  assert store_lib.token_dtype(vocab_size).name == name


def test_the_manifest_survives_json(store: store_lib.TokenStore):
  text = json.dumps(dataclasses.asdict(store.manifest))
  assert store_lib.Manifest.from_json(text) == store.manifest
  with pytest.raises(ValueError, match="format 99, this version reads 1"):
    store_lib.Manifest.from_json(text.replace('"format_version": 1', '"format_version": 99'))


def test_a_store_without_a_manifest_is_unfinished(store: store_lib.TokenStore):
  (pathlib.Path(store.path) / "manifest.json").unlink()
  with pytest.raises(errors.CalmError, match="is unfinished: run prepare again"):
    store_lib.TokenStore.open(store.path)
  with pytest.raises(errors.CalmError, match="no such token store"):
    store_lib.TokenStore.open(f"{store.path}/nowhere")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format_version": 99}', "\udcff"])
def test_a_broken_manifest_is_told_in_one_line(store: store_lib.TokenStore, text: str):
  file = pathlib.Path(store.path) / "manifest.json"
  file.write_bytes(text.encode(errors="surrogateescape"))
  with pytest.raises(errors.CalmError, match=r"can't read .*manifest\.json") as caught:
    store_lib.TokenStore.open(store.path)
  assert "\n" not in str(caught.value)


def test_a_lost_array_or_one_of_other_size_is_told_at_once(
  tmp_path: pathlib.Path, store: store_lib.TokenStore, tokenizer: tokenizer_lib.Tokenizer
):
  write(tmp_path / "other", tokenizer, [np.arange(6)])
  root = pathlib.Path(store.path)
  shutil.rmtree(root / "train/tokens")
  with pytest.raises(errors.CalmError, match="can't read the token store"):
    store_lib.TokenStore.open(store.path)
  shutil.copytree(tmp_path / "other/train/tokens", root / "train/tokens")
  with pytest.raises(errors.CalmError, match=r"is damaged: train holds \(6, 3\)"):
    store_lib.TokenStore.open(store.path)


def test_a_lost_or_damaged_file_is_never_read_as_tokens(store: store_lib.TokenStore):
  shard = pathlib.Path(store.path) / "train/tokens/c/0"
  intact = shard.read_bytes()
  shard.write_bytes(bytes([intact[0] ^ 1]) + intact[1:])
  with pytest.raises(errors.CalmError, match=r"can't read .* Error reading shard"):
    store_lib.TokenStore.open(store.path).read("train", 0, 4)
  shard.unlink()
  with pytest.raises(errors.CalmError, match=r"can't read .* is missing"):
    store_lib.TokenStore.open(store.path).read("train", 0, 4)


def test_the_store_keeps_a_copy_of_its_tokenizer(
  store: store_lib.TokenStore, tokenizer: tokenizer_lib.Tokenizer
):
  info = store.manifest.tokenizer
  copy = tokenizer_lib.load(f"{store.path}/{info.file}")
  assert (copy.hash, copy.eos_id) == (info.hash, info.eos_id) == (tokenizer.hash, tokenizer.eos_id)
