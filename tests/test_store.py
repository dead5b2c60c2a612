"""Claims about the token store: any range reads as it was written, or raises an error."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import pickle
import shutil

import numpy as np
import pytest

from calm_jax import errors, sealed_json
from calm_jax.data import arrays, store_writer
from calm_jax.data import manifest as manifest_lib
from calm_jax.data import store as store_lib
from calm_jax.data import tokenizer as tokenizer_lib


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tokenizer_lib.Tokenizer:
  path = tmp_path_factory.mktemp("tokenizer") / "any.model"
  return tokenizer_lib.train(["some text for a tokenizer"] * 3, 280, str(path))


def content(documents: list[np.ndarray], block: int = 3) -> store_writer.SplitContent:
  """Returns documents as a split to be written, in blocks that ignore their boundaries."""
  tokens = np.concatenate(documents)
  lengths = np.array([len(document) for document in documents])
  return store_writer.SplitContent(
    num_tokens=len(tokens),
    num_documents=len(lengths),
    tokens=(tokens[i : i + block] for i in range(0, len(tokens), block)),
    lengths=(lengths[i : i + block] for i in range(0, len(lengths), block)),
  )


def write(
  path: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer, train: list[np.ndarray], block: int = 3
) -> store_lib.TokenStore:
  contents = {"train": content(train, block), "heldout": content([np.array([7, 0, 1])])}
  provenance = store_writer.Provenance(
    sources=[manifest_lib.Source("a.txt", 10, len(train) + 1)],
    appends_eos=True,
    heldout=0.02,
    heldout_by="documents",
    plan={"input": "a.txt"},
  )
  return store_writer.write(str(path), tokenizer, contents, provenance)


@pytest.fixture
def store(tmp_path: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer) -> store_lib.TokenStore:
  return write(tmp_path / "store", tokenizer, [np.arange(5), np.array([9]), np.arange(100, 104)])


def test_every_range_is_read_as_it_was_written(store: store_lib.TokenStore):
  expected = np.array([0, 1, 2, 3, 4, 9, 100, 101, 102, 103])
  for start in range(11):
    for stop in range(start, 11):
      tokens = store.read("train", start, stop)
      assert tokens.dtype == np.int32
      np.testing.assert_array_equal(tokens, expected[start:stop])
  np.testing.assert_array_equal(store.read("heldout", 0, 3), [7, 0, 1])


def test_offsets_are_the_starts_of_documents_and_the_end(store: store_lib.TokenStore):
  offsets = store.offsets("train")
  assert offsets.dtype == np.int64
  np.testing.assert_array_equal(offsets, [0, 5, 6, 10])
  assert (store.manifest.splits["train"].documents, store.num_tokens("train")) == (3, 10)


def test_block_and_shard_sizes_do_not_change_the_tokens(
  tmp_path: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(arrays, "_CHUNK", 8)
  monkeypatch.setattr(arrays, "_SHARD", 32)
  rng = np.random.default_rng(0)
  documents = [rng.integers(0, 280, size) for size in (1, 31, 32, 33, 100, 2, 64)]
  stores = [write(tmp_path / str(n), tokenizer, documents, n) for n in (1, 5, 32, 1000)]
  for store in stores:
    np.testing.assert_array_equal(store.read("train", 0, 263), np.concatenate(documents))
    np.testing.assert_array_equal(store.read("train", 30, 35), np.concatenate(documents)[30:35])
    assert store.hash == stores[0].hash


def test_a_range_outside_the_split_is_an_error(store: store_lib.TokenStore):
  for start, stop in ((-1, 2), (3, 2), (0, 11)):
    with pytest.raises(ValueError, match=r"train has tokens \[0, 10\)"):
      store.read("train", start, stop)


def test_the_hash_depends_on_tokens_and_boundaries(
  tmp_path: pathlib.Path, store: store_lib.TokenStore, tokenizer: tokenizer_lib.Tokenizer
):
  same = [np.arange(5), np.array([9]), np.arange(100, 104)]
  assert write(tmp_path / "same", tokenizer, same).hash == store.hash
  other_token = [np.arange(5), np.array([8]), np.arange(100, 104)]
  assert write(tmp_path / "token", tokenizer, other_token).hash != store.hash
  other_boundary = [np.arange(5), np.array([9, 100]), np.arange(101, 104)]
  assert write(tmp_path / "boundary", tokenizer, other_boundary).hash != store.hash


def test_the_hash_does_not_depend_on_names_or_compression(
  tmp_path: pathlib.Path,
  store: store_lib.TokenStore,
  tokenizer: tokenizer_lib.Tokenizer,
  monkeypatch: pytest.MonkeyPatch,
):
  spec = arrays._spec

  def spec_of_higher_compression(*arguments):
    changed = spec(*arguments)
    inner = changed["metadata"]["codecs"][0]["configuration"]["codecs"]
    inner[1] = {"name": "zstd", "configuration": {"level": 9}}
    return changed

  monkeypatch.setattr(arrays, "_spec", spec_of_higher_compression)
  train = [np.arange(5), np.array([9]), np.arange(100, 104)]
  contents = {"train": content(train), "heldout": content([np.array([7, 0, 1])])}
  provenance = store_writer.Provenance(
    sources=[manifest_lib.Source("b.txt", 11, 5)],
    appends_eos=True,
    heldout=0.3,
    heldout_by="end",
    skipped_lines=4,
    plan={"a": "b"},
  )
  second = store_writer.write(str(tmp_path / "second"), tokenizer, contents, provenance)
  assert second.manifest != store.manifest and second.hash == store.hash


def test_reopened_and_pickled_stores_are_the_same(store: store_lib.TokenStore):
  for copy in (store_lib.TokenStore.open(store.path), pickle.loads(pickle.dumps(store))):
    assert copy.manifest == store.manifest and copy.hash == store.hash
    np.testing.assert_array_equal(copy.read("train", 3, 8), store.read("train", 3, 8))


def test_several_threads_read_the_same_as_one(store: store_lib.TokenStore):
  ranges = [(start, start + 3) for start in range(8)] * 20
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    reads = list(pool.map(lambda r: store.read("train", *r), ranges))
  for (start, stop), tokens in zip(ranges, reads, strict=True):
    np.testing.assert_array_equal(tokens, store.read("train", start, stop))


@pytest.mark.parametrize(("vocab_size", "name"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_tokens_are_stored_in_the_smallest_type(vocab_size: int, name: str):
  assert store_writer.token_dtype(vocab_size).name == name


def test_the_manifest_survives_json(store: store_lib.TokenStore):
  values = json.loads(store.manifest.to_json())
  assert manifest_lib.Manifest.from_mapping(values, "here") == store.manifest


def test_a_store_of_another_version_is_refused_by_its_number(store: store_lib.TokenStore):
  file = pathlib.Path(store.path) / "manifest.json"
  values = {**json.loads(file.read_text()), "format_version": 1}
  file.write_text(json.dumps(values))
  with pytest.raises(errors.CalmError, match="format 1, this version reads 2: prepare the text ag"):
    store_lib.TokenStore.open(store.path)


def test_a_store_without_a_manifest_is_unfinished(store: store_lib.TokenStore):
  (pathlib.Path(store.path) / "manifest.json").unlink()
  with pytest.raises(errors.CalmError, match="is unfinished: run prepare again"):
    store_lib.TokenStore.open(store.path)
  with pytest.raises(errors.CalmError, match="no such token store"):
    store_lib.TokenStore.open(f"{store.path}/nowhere")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format_version": 99}', "\udcff"])
def test_a_broken_manifest_is_reported_in_one_line(store: store_lib.TokenStore, text: str):
  file = pathlib.Path(store.path) / "manifest.json"
  file.write_bytes(text.encode(errors="surrogateescape"))
  with pytest.raises(errors.CalmError, match=r"manifest\.json.*: prepare the text again") as caught:
    store_lib.TokenStore.open(store.path)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("before", "after"),
  [
    ('"tokens": 10', '"tokens": 9'),
    ('"eos_id": 1', '"eos_id": 2'),
    ('"appends_eos": true', '"appends_eos": false'),
    ('"name": "a.txt"', '"name": "b.txt"'),
    ('"heldout": 0.02', '"heldout": 0.03'),
  ],
)
def test_an_edited_manifest_is_refused(store: store_lib.TokenStore, before: str, after: str):
  file = pathlib.Path(store.path) / "manifest.json"
  assert before in file.read_text()
  file.write_text(file.read_text().replace(before, after))
  with pytest.raises(errors.CalmError, match=r"manifest\.json is damaged: its fields have SHA"):
    store_lib.TokenStore.open(store.path)


@pytest.mark.parametrize(
  ("name", "change"),
  [
    ("dtype", "float32"),
    ("dtype", 3),
    ("splits", []),
    ("splits", {}),
    ("sources", [3]),
    ("tokenizer", {"file": "../../key", "sha256": "", "vocab_size": 3, "eos_id": 1}),
    ("tokenizer", {"file": "tokenizer.json", "sha256": "", "vocab_size": 3, "eos_id": 3}),
    ("new", 1),
  ],
)
def test_a_manifest_with_the_right_hash_and_wrong_types_is_refused(
  store: store_lib.TokenStore, name: str, change
):
  values = dataclasses.asdict(store.manifest) | {name: change}
  (pathlib.Path(store.path) / "manifest.json").write_text(json.dumps(sealed_json.sealed(values)))
  with pytest.raises(errors.CalmError, match=r"can't read .*manifest\.json") as caught:
    store_lib.TokenStore.open(store.path)
  assert "\n" not in str(caught.value)


def changed_json(path: pathlib.Path, change) -> None:
  values = json.loads(path.read_text())
  change(values["codecs"][0]["configuration"]["codecs"])
  path.write_text(json.dumps(values))


def test_tokens_of_another_encoding_are_refused_and_not_misread(store: store_lib.TokenStore):
  array = pathlib.Path(store.path) / "train/tokens/zarr.json"
  before = array.read_text()
  for change in (
    lambda codecs: codecs[0]["configuration"].update(endian="big"),
    lambda codecs: codecs.pop(),  # The checksum.
  ):
    array.write_text(before)
    changed_json(array, change)
    with pytest.raises(errors.CalmError, match=r"can't read .* Mismatch in \"codecs\"") as caught:
      store_lib.TokenStore.open(store.path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["manifest.json", "train/tokens/zarr.json", "heldout/offsets/c/0"])
def test_a_pipe_in_place_of_a_file_does_not_block(store: store_lib.TokenStore, name: str):
  file = pathlib.Path(store.path) / name
  file.unlink()
  os.mkfifo(file)
  with pytest.raises(errors.CalmError, match=rf"{name} is (a pipe|missing or not a file)"):
    store_lib.TokenStore.open(store.path)


def test_checks_cover_every_file_and_report_its_size(store: store_lib.TokenStore):
  lines = {name: check() for name, check in store.checks()}
  assert list(lines) == [
    "manifest.json",
    "plan.json",
    "tokenizer.model",
    "train/tokens",
    "train/offsets",
    "heldout/tokens",
    "heldout/offsets",
  ]
  assert "10 tokens" in lines["train/tokens"] and "3 documents" in lines["train/offsets"]


@pytest.mark.parametrize(
  "name",
  ["tokenizer.model", "plan.json", "train/tokens/c/0", "train/tokens/c/1", "train/offsets/c/0"],
)
def test_checks_name_the_first_damaged_file(
  tmp_path: pathlib.Path,
  tokenizer: tokenizer_lib.Tokenizer,
  monkeypatch: pytest.MonkeyPatch,
  name: str,
):
  monkeypatch.setattr(arrays, "_CHUNK", 8)
  monkeypatch.setattr(arrays, "_SHARD", 16)
  documents = [[np.arange(5), np.arange(25)], [np.arange(4), np.arange(100, 126)]]
  first, second = (write(tmp_path / n, tokenizer, d) for n, d in zip("ab", documents, strict=True))
  for _, check in first.checks():
    check()
  target = pathlib.Path(first.path) / name
  if target.suffix:
    target.write_bytes(target.read_bytes() + b" ")
  else:  # A file of the same size that is intact by its own checksum.
    shutil.copyfile(pathlib.Path(second.path) / name, target)
  opened = store_lib.TokenStore.open(first.path)
  if "offsets" in name:  # Offsets are always read completely, so every reader notices.
    with pytest.raises(errors.CalmError, match=f"{name} is damaged"):
      opened.offsets("train")
  with pytest.raises(errors.CalmError, match=rf"{name} (is damaged: .*|has) SHA-256 .*: prepare"):
    for _, check in opened.checks():
      check()


def test_checks_refuse_tokens_outside_the_vocabulary(
  tmp_path: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer
):
  store = write(tmp_path / "store", tokenizer, [np.array([1, 280, 3])])
  with pytest.raises(
    errors.CalmError, match="tokens is damaged: it holds token 280, but the vocab"
  ):
    for _, check in store.checks():
      check()


def test_a_store_that_reads_back_differently_stays_unfinished(
  tmp_path: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer, monkeypatch: pytest.MonkeyPatch
):
  """A second writer or a disk zeroes a shard between writing and reading."""
  opened = arrays.open

  def zeroed(path, name, size, dtype, num_sums):
    if name == "train/tokens":
      spec = arrays._spec(path, name, size, dtype)
      arrays.tensorstore.open(spec, open=True).result().write(np.zeros(size, dtype)).result()
    return opened(path, name, size, dtype, num_sums)

  monkeypatch.setattr(arrays, "open", zeroed)
  with pytest.raises(errors.CalmError, match=r"train/tokens/c/0 is damaged"):
    write(tmp_path / "store", tokenizer, [np.arange(5)])
  monkeypatch.undo()
  with pytest.raises(errors.CalmError, match="unfinished"):
    store_lib.TokenStore.open(str(tmp_path / "store"))


def test_a_written_store_and_its_folders_are_on_the_disk_before_its_manifest(
  tmp_path: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer, monkeypatch: pytest.MonkeyPatch
):
  synced, fsync = [], os.fsync

  def note(descriptor: int) -> None:
    synced.append(os.path.relpath(os.path.realpath(f"/proc/self/fd/{descriptor}"), tmp_path))
    fsync(descriptor)

  monkeypatch.setattr(os, "fsync", note)
  write(tmp_path / "store", tokenizer, [np.arange(5)])
  assert synced[-2:] == [f"store/manifest.json.{os.getpid()}.tmp", "store"]
  folders = {".", "store", "store/train", "store/heldout", "store/train/tokens"}
  assert folders < set(synced[:-2]) and f"store/tokenizer.model.{os.getpid()}.tmp" in synced[:-2]


def test_a_missing_array_or_one_of_another_size_is_refused_on_opening(
  tmp_path: pathlib.Path, store: store_lib.TokenStore, tokenizer: tokenizer_lib.Tokenizer
):
  write(tmp_path / "other", tokenizer, [np.arange(6)])
  root = pathlib.Path(store.path)
  shutil.rmtree(root / "train/tokens")
  with pytest.raises(errors.CalmError, match=r"can't read the token store .*train/tokens"):
    store_lib.TokenStore.open(store.path)
  shutil.copytree(tmp_path / "other/train/tokens", root / "train/tokens")
  with pytest.raises(errors.CalmError, match=r"can't read .*\[10\] but received: \[6\]"):
    store_lib.TokenStore.open(store.path)


def test_a_missing_or_damaged_shard_is_never_read_as_tokens(store: store_lib.TokenStore):
  shard = pathlib.Path(store.path) / "train/tokens/c/0"
  intact = shard.read_bytes()
  shard.write_bytes(bytes([intact[0] ^ 1]) + intact[1:])
  with pytest.raises(errors.CalmError, match=r"can't read .* Error reading shard"):
    store_lib.TokenStore.open(store.path).read("train", 0, 4)
  shard.unlink()
  with pytest.raises(errors.CalmError, match=r"can't read .*train/tokens/c/0 is missing"):
    store_lib.TokenStore.open(store.path)


def test_the_store_keeps_a_copy_of_its_tokenizer(
  store: store_lib.TokenStore, tokenizer: tokenizer_lib.Tokenizer
):
  info = store.manifest.tokenizer
  copy = tokenizer_lib.load(f"{store.path}/{info.file}")
  assert (copy.hash, copy.eos_id) == (info.hash, info.eos_id) == (tokenizer.hash, tokenizer.eos_id)
