"""Folders of named tensors in Hugging Face's layout: read lazily, written in shards.

A folder holds model.safetensors or pytorch_model.bin, or several of either with an index.
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
  """A tensor in a file that is not read yet.

  Attributes:
    file: name of the file.
    shape: shape of the tensor.
    dtype: its type in the file.
    read: reads the tensor and returns it as float32.
  """

  file: str
  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]


def _safetensors(path: pathlib.Path) -> dict[str, Stored]:
  """Returns the tensors of a safetensors file by name."""
  files.require_regular(path)
  try:
    opened = safetensors.safe_open(path, framework="np")
    names: list[str] = opened.keys()  # The handle itself is not a mapping.
    slices = {name: opened.get_slice(name) for name in names}
  except (safetensors.SafetensorError, OSError) as error:
    raise errors.CalmError(f"can't read {path}: {error}; is it truncated?") from error
  tensors = {}
  for name, part in slices.items():

    def read(name=name) -> np.ndarray:
      return np.asarray(opened.get_tensor(name), np.float32)

    tensors[name] = Stored(path.name, tuple(part.get_shape()), part.get_dtype(), read)
  return tensors


def _pickle(path: pathlib.Path) -> dict[str, Stored]:
  """Returns the tensors of a PyTorch file by name."""
  tensors = {}
  for name, value in pickles.load(path).items():

    def read(value=value) -> np.ndarray:
      return value.detach().float().numpy()

    dtype = str(value.dtype).removeprefix("torch.")
    tensors[name] = Stored(path.name, tuple(value.shape), dtype, read)
  return tensors


# Name of the weights file -> its reader; the file may be replaced by shards and an index.
_READERS: dict[str, Callable[[pathlib.Path], dict[str, Stored]]] = {
  SAFETENSORS: _safetensors,
  PICKLE: _pickle,
}
# File names of weights; a folder with weights has one of them.
WEIGHTS = tuple(name for file_name in _READERS for name in (file_name, f"{file_name}.index.json"))


def open_folder(folder: pathlib.Path) -> dict[str, Stored]:
  """Returns the tensors of a folder by name; their values are not read yet.

  Raises:
    CalmError: if there are no weights, a file is damaged or missing, a tensor is empty or not
      of floats, or an index names a file outside the folder or a wrong file of a tensor.
  """
  for file_name, reader in _READERS.items():
    index = folder / f"{file_name}.index.json"
    if (folder / file_name).exists():
      tensors = reader(folder / file_name)
    elif index.exists():
      tensors = _indexed(index, reader)
    else:
      continue
    for name, stored in tensors.items():
      _require_weight(folder, name, stored)
    return tensors
  raise errors.CalmError(
    f"no weights in {folder}: there is neither {SAFETENSORS} nor {PICKLE}, nor an index of either"
  )


def _require_weight(folder: pathlib.Path, name: str, stored: Stored) -> None:
  """Raises CalmError for a tensor that can't be a weight."""
  if not name.isprintable():
    raise errors.CalmError(f"{folder / stored.file}: a tensor is called {name!r}; is it damaged?")
  where = f"{folder / stored.file}: tensor {name}"
  if stored.dtype not in FLOATS and "rotary" not in name:
    raise errors.CalmError(
      f"{where} has dtype {stored.dtype}; weights are float32, float16 or bfloat16"
    )
  if 0 in stored.shape:
    raise errors.CalmError(f"{where} is empty: its shape is {list(stored.shape)}")


def _indexed(index: pathlib.Path, reader) -> dict[str, Stored]:
  """Returns the tensors of the shards that an index names, by name."""
  file_of = files.read_json(index).get("weight_map")
  if not isinstance(file_of, dict) or not all(isinstance(x, str) for x in file_of.values()):
    raise errors.CalmError(f"{index} has no weight_map from tensors to files")
  tensors: dict[str, Stored] = {}
  for file in sorted(set(file_of.values())):
    if pathlib.PurePath(file).name != file or file in ("", ".", ".."):
      raise errors.CalmError(f"{index} names a file outside its folder: {file!r}")
    path = index.parent / file
    if not path.exists():
      raise errors.CalmError(f"{index} names {file!r}, which does not exist")
    shard = reader(path)
    for name in (name for name, its_file in file_of.items() if its_file == file):
      if name not in shard:
        raise errors.CalmError(
          f"{index} says that {name!r} is in {file!r}, which has no such tensor"
        )
      tensors[name] = shard[name]
    extra = sorted(name for name in shard if file_of.get(name) != file)
    if extra:
      raise errors.CalmError(f"{path} holds {extra[0]!r}, which {index.name} does not assign to it")
  return tensors


@dataclasses.dataclass(frozen=True)
class Outgoing:
  """A tensor to be written.

  Attributes:
    name: its name.
    shape: its shape.
    make: returns its values; called only when its shard is written.
  """

  name: str
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]


def write_folder(folder: pathlib.Path, outgoing: Iterable[Outgoing]) -> None:
  """Writes float32 tensors to one file, or to shards with an index if they exceed SHARD_BYTES.

  Every shard is read back and compared, because the writer would silently store a transposed
  array in the wrong order. At most one shard is in memory in addition to the source.

  Raises:
    CalmError: if a file can't be written or reads back differently.
  """
  shards: list[list[Outgoing]] = [[]]
  bytes_left, total = SHARD_BYTES, 0
  for tensor in outgoing:
    size = 4 * int(np.prod(tensor.shape))
    if size > bytes_left and shards[-1]:
      shards.append([])
      bytes_left = SHARD_BYTES
    shards[-1].append(tensor)
    bytes_left, total = bytes_left - size, total + size
  file_of = {}
  for number, shard in enumerate(shards, start=1):
    stem, ending = SAFETENSORS.split(".")
    file = SAFETENSORS
    if len(shards) > 1:
      file = f"{stem}-{number:05}-of-{len(shards):05}.{ending}"
    _write_shard(folder / file, shard)
    file_of |= {tensor.name: file for tensor in shard}
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    files.write(folder / f"{SAFETENSORS}.index.json", files.to_json(index))


def _write_shard(path: pathlib.Path, shard: list[Outgoing]) -> None:
  """Writes one file of tensors, reads it back and compares."""
  arrays = {t.name: np.ascontiguousarray(t.make(), np.float32) for t in shard}
  for tensor in shard:
    assert arrays[tensor.name].shape == tensor.shape, tensor.name
  try:
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files that only their owner can read.
    with safetensors.safe_open(path, framework="np") as opened:
      for name, array in arrays.items():
        bits = np.uint32  # Compares bits, so that NaN equals itself.
        if not np.array_equal(opened.get_tensor(name).view(bits), array.view(bits)):
          raise errors.CalmError(f"{path}: {name} does not read back as it was written")
  except (safetensors.SafetensorError, OSError) as error:
    raise errors.CalmError(f"can't write {path}: {error}") from error
