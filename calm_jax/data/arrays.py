"""Flat arrays of a token store: zarr v3, sharded, compressed, each chunk with a checksum.

TensorStore's file driver syncs each file and its folder by itself (`file_io_sync`), but not
the folders above, which `sync_folders` does.
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
_SHARD = 2**24  # Elements a file.
_READ = 2**20  # Elements read at once where a whole array is.


def open(path: str, name: str, size: int, dtype: np.dtype, num_sums: int) -> Any:
  """Returns the array `name` of the store at `path`, to be read.

  Args:
    num_sums: how many sums of shards there are.

  Raises:
    CalmError: if it is not there, a file of it is missing, or it is of another size,
      type or coding.
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
    CalmError: if what is read back is not what was written.
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
  """Yields all elements in blocks, and raises where a shard has another SHA-256 than `sums`.

  Raises:
    CalmError: naming the file of the first shard that is not as it was written.
  """
  for shard, expected in enumerate(sums):
    found = hashlib.sha256()
    begin, end = shard * _SHARD, min((shard + 1) * _SHARD, array.shape[0])
    for start in range(begin, end, _READ):
      block = result(array[start : min(start + _READ, end)].read(), path)
      found.update(block.astype(_stored(block.dtype), copy=False).data)
      yield block
    if found.hexdigest() != expected:
      raise errors.CalmError(
        f"{_folder(path, name)}c/{shard} is damaged: its elements have SHA-256 "
        f"{found.hexdigest()[:16]}, they were written with {expected[:16]}: {manifest.AGAIN}"
      )


def result(pending: Any, path: str) -> np.ndarray:
  """Returns the elements of a read that was started, TensorStore's future.

  Raises:
    CalmError: if they are lost or damaged.
  """
  try:
    return pending.result()
  except ValueError as error:
    raise errors.CalmError(f"can't read the token store {path}: {_reason(error)}") from error


def sync_folders(path: str) -> None:
  """Returns when the names of all folders below `path`, and its own, are on the disk."""
  if not files.is_local(path):
    return
  for folder, _, _ in os.walk(path):
    files.sync(folder)
  parent = os.path.dirname(files.absolute(path))
  if os.access(parent, os.R_OK):  # One that can't be listed can't be synced.
    files.sync(parent)


def _require_files(path: str, name: str, count: int) -> None:
  """Raises CalmError unless the files of a local array are there, and are files.

  TensorStore would wait for ever to open a pipe, and miss a lost shard only when it is read.
  """
  folder = _folder(path, name)
  files.require_regular(f"{folder}zarr.json")
  try:
    with os.scandir(f"{folder}c") as entries:
      found = {entry.name for entry in entries if entry.is_file()} if count else set()
  except OSError as error:
    if not count:
      return
    raise errors.CalmError(f"can't read the token store {path}: {error}") from error
  for shard in range(count):
    if str(shard) not in found:
      raise errors.CalmError(
        f"can't read the token store {path}: {folder}c/{shard} is missing or no file"
      )


def _regrouped(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
  """Yields the same elements in blocks of `size`, the last one shorter."""
  held, count = [], 0
  for block in blocks:
    held.append(block)
    count += len(block)
    if count >= size:
      whole = np.concatenate(held)
      yield from (whole[i : i + size] for i in range(0, count - size + 1, size))
      held, count = [whole[count - count % size :]], count % size
  if count:
    yield np.concatenate(held)


def _stored(dtype: np.dtype) -> np.dtype:
  return dtype.newbyteorder("<")


def _reason(error: ValueError) -> str:
  """Returns the beginning of what TensorStore tells, without the whole specification."""
  return f"{' '.join(str(error).partition(' [tensorstore_spec=')[0].split()):.400}"


def _folder(path: str, name: str) -> str:
  return f"{files.absolute(path).rstrip('/')}/{name}/"


def _spec(path: str, name: str, size: int, dtype: np.dtype) -> dict[str, Any]:
  """Returns how an array lies; one that is opened must lie so."""
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
    # A lost file is an error, not a run of zeros.
    "fill_missing_data_reads": False,
    "store_data_equal_to_fill_value": True,
    "metadata": {
      "shape": [size],
      "data_type": dtype.name,
      "chunk_grid": grid,
      "codecs": [{"name": "sharding_indexed", "configuration": sharded}],
    },
  }
