"""Folders of named tensors, as Hugging Face writes them: read lazily, written in shards.

model.safetensors or pytorch_model.bin, or several of them with an index.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from calm_jax import errors, files

SHARD_BYTES = 2**30
FLOATS = ("F32", "F16", "BF16", "float32", "float16", "bfloat16")
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file, not read yet. `read` gives it as float32."""

  file: str
  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]


def _safetensors(path: pathlib.Path) -> dict[str, Stored]:
  try:
    opened = safetensors.safe_open(path, framework="np")
  except (safetensors.SafetensorError, OSError) as error:
    raise errors.CalmError(f"can't read {path}: {error}; is it cut short?") from error
  found = {}
  names: list[str] = opened.keys()  # The handle itself is no mapping.
  for name in names:
    part = opened.get_slice(name)

    def read(name=name) -> np.ndarray:
      return np.asarray(opened.get_tensor(name), np.float32)

    found[name] = Stored(path.name, tuple(part.get_shape()), part.get_dtype(), read)
  return found


def _pickle(path: pathlib.Path) -> dict[str, Stored]:
  try:
    import torch
  except ImportError as error:
    raise errors.CalmError(
      f"{path} is a PyTorch file, which takes torch to read: pip install torch"
    ) from error
  try:
    with path.open("rb") as file:
      is_zip = file.read(2) == b"PK"  # PyTorch's format since 1.6; the one before can't be mapped.
    values = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
  except Exception as error:  # A pickle that holds anything but tensors, or a damaged file.
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    raise errors.CalmError(
      f"can't read {path} as plain weights; it is damaged, or holds what would have to be run, "
      f"which is not done: {reason}"
    ) from error
  if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
    raise errors.CalmError(f"{path} holds no tensors by name, but a {type(values).__name__}")
  found = {}
  for name, value in values.items():
    if not isinstance(value, torch.Tensor):
      raise errors.CalmError(f"{path} holds {name!r}, which is no tensor: {type(value).__name__}")

    def read(value=value) -> np.ndarray:
      return value.detach().to(torch.float32).numpy()

    dtype = str(value.dtype).removeprefix("torch.")
    found[name] = Stored(path.name, tuple(value.shape), dtype, read)
  return found


# How a folder's weights may lie: the file, or its index; and what reads a file.
_READERS: dict[str, Callable[[pathlib.Path], dict[str, Stored]]] = {
  SAFETENSORS: _safetensors,
  PICKLE: _pickle,
}


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the mapping in a JSON file; CalmError if there is none."""
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise errors.CalmError(f"can't read {path}: {error}") from error
  except ValueError as error:
    raise errors.CalmError(f"{path} is no valid JSON: {error}") from error
  if not isinstance(values, dict):
    raise errors.CalmError(f"{path} must hold a mapping, got {type(values).__name__}")
  return values


def open_folder(folder: pathlib.Path) -> dict[str, Stored]:
  """Returns the tensors of a folder by name, none of them read yet.

  Raises:
    CalmError: if there are no weights, a file is damaged or missing, or an index
      names a file outside the folder or a tensor that is not where it says.
  """
  for single, reader in _READERS.items():
    index = folder / f"{single}.index.json"
    if (folder / single).exists():
      found = reader(folder / single)
    elif index.exists():
      found = _indexed(index, reader)
    else:
      continue
    for name, stored in found.items():
      if stored.dtype not in FLOATS and "rotary" not in name:
        raise errors.CalmError(
          f"{folder / stored.file}: tensor {name} has dtype {stored.dtype}; weights are float32, "
          "float16 or bfloat16"
        )
    return found
  raise errors.CalmError(
    f"no weights in {folder}: there is neither {SAFETENSORS} nor {PICKLE}, nor an index of either"
  )


def _indexed(index: pathlib.Path, reader) -> dict[str, Stored]:
  where = read_json(index).get("weight_map")
  if not isinstance(where, dict) or not all(isinstance(x, str) for x in where.values()):
    raise errors.CalmError(f"{index} has no weight_map from tensors to files")
  found: dict[str, Stored] = {}
  for file in sorted(set(where.values())):
    if pathlib.PurePath(file).name != file or file in ("", ".", ".."):
      raise errors.CalmError(f"{index} names a file outside its folder: {file!r}")
    path = index.parent / file
    if not path.exists():
      raise errors.CalmError(f"{index} names {file}, which is not there")
    there = reader(path)
    for name in (name for name, at in where.items() if at == file):
      if name not in there:
        raise errors.CalmError(f"{index} says that {name} is in {file}, which has no such tensor")
      found[name] = there[name]
    extra = sorted(there.keys() - where.keys())
    if extra:
      raise errors.CalmError(f"{path} holds {extra[0]}, which {index.name} does not name")
  return found


@dataclasses.dataclass(frozen=True)
class Outgoing:
  """A tensor to be written: made only when its shard is."""

  name: str
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]


def write_folder(folder: pathlib.Path, outgoing: Iterable[Outgoing]) -> None:
  """Writes float32 tensors, in shards with an index where there are more bytes than one holds.

  Every shard is read back and compared: the writer would silently store the wrong
  order of a transposed array. At most a shard is in memory beside the source.

  Raises:
    CalmError: if a file can't be written or does not read back.
  """
  shards: list[list[Outgoing]] = [[]]
  room, total = SHARD_BYTES, 0
  for tensor in outgoing:
    size = 4 * int(np.prod(tensor.shape))
    if size > room and shards[-1]:
      shards.append([])
      room = SHARD_BYTES
    shards[-1].append(tensor)
    room, total = room - size, total + size
  where = {}
  for number, shard in enumerate(shards, start=1):
    stem, ending = SAFETENSORS.split(".")
    file = SAFETENSORS
    if len(shards) > 1:
      file = f"{stem}-{number:05}-of-{len(shards):05}.{ending}"
    _write_shard(folder / file, shard)
    where |= {tensor.name: file for tensor in shard}
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": where}
    files.write(folder / f"{SAFETENSORS}.index.json", files.to_json(index))


def _write_shard(path: pathlib.Path, shard: list[Outgoing]) -> None:
  arrays = {t.name: np.ascontiguousarray(t.make(), np.float32) for t in shard}
  for tensor in shard:
    assert arrays[tensor.name].shape == tensor.shape, tensor.name
  try:
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors lets its owner alone read it.
    with safetensors.safe_open(path, framework="np") as back:
      for name, array in arrays.items():
        bits = np.uint32  # So that NaN, too, equals itself.
        if not np.array_equal(back.get_tensor(name).view(bits), array.view(bits)):
          raise errors.CalmError(f"{path}: {name} does not read back as it was written")
  except (safetensors.SafetensorError, OSError) as error:
    raise errors.CalmError(f"can't write {path}: {error}") from error


def require_local(path: str) -> None:
  """Raises CalmError for a bucket's URL: folders of other frameworks are files here."""
  if "://" in path:
    raise errors.CalmError(f"{path} is no local folder: convert on a disk, then copy")


@contextlib.contextmanager
def new_folder(output: str) -> Iterator[pathlib.Path]:
  """Gives a folder to write into that becomes `output` at the end, if nothing went wrong.

  Raises:
    CalmError: if `output` is there already or can't be written.
  """
  require_local(output)
  target = pathlib.Path(output)
  if target.exists():
    raise errors.CalmError(f"{output} exists already: give a new --output")
  partial = None
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    partial.chmod(0o755)
    yield partial
    partial.rename(target)
  except OSError as error:
    raise errors.CalmError(f"can't write --output={output}: {error}") from error
  finally:
    if partial and partial.exists():
      shutil.rmtree(partial)
