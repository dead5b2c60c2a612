"""Flat arrays of a token store: zarr v3, sharded, compressed, with a checksum per chunk.

TensorStore's file driver syncs each file and its folder (`file_io_sync`), but not the folders
above; `sync_folders` does that.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorstore

from calm_jax import errors, files
from calm_jax.data import manifest

_CHUNK = 8192  # Elements that are compressed and read together.
_SHARD = 2**24  # Elements per file.
_READ = 2**20  # Elements per read of a complete array.


def open(path: str, name: str, size: int, dtype: np.dtype, num_sums: int) -> Any:
  """Opens the array `name` of the store at `path` for reading and returns it.

  Args:
    num_sums: number of shards that the manifest has a sum of.

  Raises:
    CalmError: if the array or a file of it is missing, or its size, type or encoding
      differs from what the manifest implies.
  """
  shards = -(-size // _SHARD)
  if num_sums != shards:
    raise errors.CalmError(
      f"{path} is damaged: {name} of {size} elements has {shards} shards and {num_sums} sums"
    )
  if files.is_local(path):
    _require_files(path, name, shards)
  try:
    return tensorstore.open(_spec(path, name, size, dtype), read=True, open=True).result()
  except ValueError as error:
    raise errors.CalmError(f"can't read the token store {path}: {_reason(error)}") from error


def write(
  path: str, name: str, size: int, dtype: np.dtype, blocks: Iterable[np.ndarray]
) -> tuple[str, ...]:
  """Writes an array of `size` elements and returns the SHA-256 of each shard's elements.

  Raises:
    CalmError: if the elements read back differ from those written.
  """
  array = tensorstore.open(_spec(path, name, size, dtype), create=True, delete_existing=True)
  array = array.result()
  sums, start = [], 0
  for block in _regrouped(blocks, _SHARD):
    stored = block.astype(_stored(dtype), copy=False)
    sums.append(hashlib.sha256(stored.data).hexdigest())
    array[start : start + len(stored)].write(stored).result()
    start += len(stored)
  assert start == size, (name, start, size)
  for _ in verified(open(path, name, size, dtype, len(sums)), path, name, sums):
    pass
  return tuple(sums)


def verified(array: Any, path: str, name: str, sums: Iterable[str]) -> Iterator[np.ndarray]:
  """Yields all elements in blocks and compares the SHA-256 of each shard with `sums`.

  Raises:
    CalmError: at the first shard whose sum differs; names its file.
  """
  for shard, expected in enumerate(sums):
    sha256 = hashlib.sha256()
    begin, end = shard * _SHARD, min((shard + 1) * _SHARD, array.shape[0])
    for start in range(begin, end, _READ):
      block = result(array[start : min(start + _READ, end)].read(), path)
      sha256.update(block.astype(_stored(block.dtype), copy=False).data)
      yield block
    if sha256.hexdigest() != expected:
      raise errors.CalmError(
        f"{_folder(path, name)}c/{shard} is damaged: its elements have SHA-256 "
        f"{sha256.hexdigest()[:16]}, but {expected[:16]} when written: {manifest.ADVICE}"
      )


def result(pending: Any, path: str) -> np.ndarray:
  """Waits for a read, TensorStore's future, and returns its elements.

  Raises:
    CalmError: if they are missing or damaged.
  """
  try:
    return pending.result()
  except ValueError as error:
    raise errors.CalmError(f"can't read the token store {path}: {_reason(error)}") from error


def sync_folders(path: str) -> None:
  """Flushes all folders below `path` to disk, and the folder that holds `path`."""
  if not files.is_local(path):
    return
  for folder, _, _ in os.walk(path):
    files.sync(folder)
  parent = os.path.dirname(files.absolute(path))
  if os.access(parent, os.R_OK):  # A folder that can't be listed can't be synced.
    files.sync(parent)


def _require_files(path: str, name: str, count: int) -> None:
  """Raises CalmError unless all `count` shards of a local array exist as regular files.

  TensorStore would block on opening a pipe, and notice a missing shard only on reading it.
  """
  folder = _folder(path, name)
  files.require_regular(f"{folder}zarr.json")
  try:
    with os.scandir(f"{folder}c") as entries:
      names = {entry.name for entry in entries if entry.is_file()} if count else set()
  except OSError as error:
    if not count:
      return
    raise errors.CalmError(f"can't read the token store {path}: {error}") from error
  for shard in range(count):
    if str(shard) not in names:
      raise errors.CalmError(
        f"can't read the token store {path}: {folder}c/{shard} is missing or not a file"
      )


def _regrouped(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
  """Yields the same elements in blocks of `size`; the last block may be shorter."""
  pending, count = [], 0
  for block in blocks:
    pending.append(block)
    count += len(block)
    if count >= size:
      joined = np.concatenate(pending)
      yield from (joined[i : i + size] for i in range(0, count - size + 1, size))
      pending, count = [joined[count - count % size :]], count % size
  if count:
    yield np.concatenate(pending)


def _stored(dtype: np.dtype) -> np.dtype:
  """Returns the little-endian type that elements are stored in."""
  return dtype.newbyteorder("<")


def _reason(error: ValueError) -> str:
  """Returns the beginning of TensorStore's message, without the array's specification."""
  return f"{' '.join(str(error).partition(' [tensorstore_spec=')[0].split()):.400}"


def _folder(path: str, name: str) -> str:
  return f"{files.absolute(path).rstrip('/')}/{name}/"


def _spec(path: str, name: str, size: int, dtype: np.dtype) -> dict[str, Any]:
  """Returns the storage layout of an array; opening checks that it matches."""
  inner = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 1}},
    {"name": "crc32c"},
  ]
  sharded = {"chunk_shape": [_CHUNK], "codecs": inner}
  grid = {"name": "regular", "configuration": {"chunk_shape": [_SHARD]}}
  url = _folder(path, name)
  return {
    "driver": "zarr3",
    "kvstore": {"driver": "file", "path": url} if files.is_local(path) else url,
    # A missing file is an error, not a run of zeros.
    "fill_missing_data_reads": False,
    "store_data_equal_to_fill_value": True,
    "metadata": {
      "shape": [size],
      "data_type": dtype.name,
      "chunk_grid": grid,
      "codecs": [{"name": "sharding_indexed", "configuration": sharded}],
    },
  }
