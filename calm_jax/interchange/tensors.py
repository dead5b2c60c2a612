"""Folders of named tensors, as Hugging Face writes them: read lazily, written in shards.

model.safetensors or pytorch_model.bin, or several of them with an index.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable

import numpy as np
import safetensors
import safetensors.numpy

from calm_jax import errors, files
from calm_jax.interchange import pickles

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
  files.require_regular(path)
  try:
    opened = safetensors.safe_open(path, framework="np")
    names: list[str] = opened.keys()  # The handle itself is no mapping.
    parts = {name: opened.get_slice(name) for name in names}
  except (safetensors.SafetensorError, OSError) as error:
    raise errors.CalmError(f"can't read {path}: {error}; is it cut short?") from error
  found = {}
  for name, part in parts.items():

    def read(name=name) -> np.ndarray:
      return np.asarray(opened.get_tensor(name), np.float32)

    found[name] = Stored(path.name, tuple(part.get_shape()), part.get_dtype(), read)
  return found


def _pickle(path: pathlib.Path) -> dict[str, Stored]:
  found = {}
  for name, value in pickles.load(path).items():

    def read(value=value) -> np.ndarray:
      return value.detach().float().numpy()

    dtype = str(value.dtype).removeprefix("torch.")
    found[name] = Stored(path.name, tuple(value.shape), dtype, read)
  return found


# How a folder's weights may lie: the file, or its index; and what reads a file.
_READERS: dict[str, Callable[[pathlib.Path], dict[str, Stored]]] = {
  SAFETENSORS: _safetensors,
  PICKLE: _pickle,
}
# Names of which a folder with weights has one.
WEIGHTS = tuple(name for single in _READERS for name in (single, f"{single}.index.json"))


def open_folder(folder: pathlib.Path) -> dict[str, Stored]:
  """Returns the tensors of a folder by name, none of them read yet.

  Raises:
    CalmError: if there are no weights, a file is damaged or missing, a tensor is empty
      or of no float, or an index names a file outside the folder or a tensor that is
      not where it says.
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
      _require_weight(folder, name, stored)
    return found
  raise errors.CalmError(
    f"no weights in {folder}: there is neither {SAFETENSORS} nor {PICKLE}, nor an index of either"
  )


def _require_weight(folder: pathlib.Path, name: str, stored: Stored) -> None:
  """Raises CalmError for a tensor that can't be weights."""
  if not name.isprintable():
    raise errors.CalmError(f"{folder / stored.file}: no tensor is called {name!r}; is it damaged?")
  where = f"{folder / stored.file}: tensor {name}"
  if stored.dtype not in FLOATS and "rotary" not in name:
    raise errors.CalmError(
      f"{where} has dtype {stored.dtype}; weights are float32, float16 or bfloat16"
    )
  if 0 in stored.shape:
    raise errors.CalmError(f"{where} is empty: its shape is {list(stored.shape)}")


def _indexed(index: pathlib.Path, reader) -> dict[str, Stored]:
  where = files.read_json(index).get("weight_map")
  if not isinstance(where, dict) or not all(isinstance(x, str) for x in where.values()):
    raise errors.CalmError(f"{index} has no weight_map from tensors to files")
  found: dict[str, Stored] = {}
  for file in sorted(set(where.values())):
    if pathlib.PurePath(file).name != file or file in ("", ".", ".."):
      raise errors.CalmError(f"{index} names a file outside its folder: {file!r}")
    path = index.parent / file
    if not path.exists():
      raise errors.CalmError(f"{index} names {file!r}, which is not there")
    there = reader(path)
    for name in (name for name, at in where.items() if at == file):
      if name not in there:
        raise errors.CalmError(
          f"{index} says that {name!r} is in {file!r}, which has no such tensor"
        )
      found[name] = there[name]
    extra = sorted(name for name in there if where.get(name) != file)
    if extra:
      raise errors.CalmError(f"{path} holds {extra[0]!r}, which {index.name} does not put there")
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
