"""An exported folder -> what there is to check of it, a function a thing.

Each returns what it looked at, for people, and raises CalmError at the first lie. All
take the folders of any format, and folders of others as far as they can be imported.
"""

import importlib.util
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jax import export

from calm_jax import errors, files, workdir
from calm_jax.interchange import checksums, names, reading, tensors


def is_exported(folder: pathlib.Path) -> bool:
  """Tells whether a folder is one that is exported or can be imported, and no workdir."""
  has_weights = any((folder / name).exists() for name in tensors.WEIGHTS)
  return (folder / checksums.NAME).exists() or (
    has_weights and not (folder / "origin.json").exists()
  )


def sums(folder: pathlib.Path) -> str:
  """Checks that each file has the SHA-256 it was written with, and none is missing or added."""
  count = checksums.check(folder, reading.USED)
  return f"{count} files" if count else f"not checked: there is no {checksums.NAME}"


def headers(folder: pathlib.Path) -> str:
  """Checks that weight files begin with what tells their tensors, and are not cut short."""
  count = sum(len(tensors.open_folder(place)) for place in _with_weights(folder))
  return f"{count} tensors" if count else "no weights by name"


def index(folder: pathlib.Path) -> str:
  """Checks that each tensor is in the file where an index says, and no file holds others."""
  names_of = [place for place in _with_weights(folder) if any(place.glob("*.index.json"))]
  shards = {stored.file for place in names_of for stored in tensors.open_folder(place).values()}
  return f"{len(shards)} shards" if shards else "no shards"


def shapes(folder: pathlib.Path) -> str:
  """Checks that tensors are those of the model that config.json or the programs tell of."""
  compiled, graphs = sorted(folder.glob("*.stablehlo")), sorted(folder.glob("*.onnx"))
  if graphs and importlib.util.find_spec("onnx") is None:
    return "not checked: that takes onnx: pip install -e '.[onnx]'"
  for path in compiled:
    _check_compiled(path, tensors.open_folder(folder))
  for path in graphs:
    _check_graph(path)
  if compiled or graphs:
    return f"{len(compiled) + len(graphs)} programs"
  for place in _with_weights(folder):
    reading.check(place)
  return "as config.json says"


def values(folder: pathlib.Path) -> str:
  """Checks that all weights are finite, one tensor at a time."""
  count = 0
  for place in _with_weights(folder):
    for name, stored in tensors.open_folder(place).items():
      if stored.dtype in tensors.FLOATS:
        names.require_finite(stored.read(), name, place)
        count += int(np.prod(stored.shape))
  return f"{count:,} weights"


# In the order in which they are best asked.
CHECKS: Mapping[str, Callable[[pathlib.Path], str]] = {
  "checksums": sums,
  "headers": headers,
  "index": index,
  "shapes": shapes,
  "values": values,
}


def _with_weights(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives the folder and the autoencoder's inside it, where they hold weights by name."""
  for place in (folder, folder / workdir.AUTOENCODER):
    if any((place / name).exists() for name in tensors.WEIGHTS):
      yield place


def _check_compiled(path: pathlib.Path, held: Mapping[str, tensors.Stored]) -> None:
  """Raises CalmError unless an artefact can be read and takes the folder's weights."""
  try:
    exported = export.deserialize(bytearray(files.read(path)))
    (weights, *_), _ = exported.in_tree.unflatten(exported.in_avals)
  except errors.CalmError:
    raise
  except Exception as error:  # A damaged flatbuffer raises whatever it trips over.
    reason = " ".join(str(error).split()) or type(error).__name__
    raise errors.CalmError(f"{path} is no artefact of jax.export: {reason}") from error
  for name in sorted(weights.keys() | held.keys()):
    wanted = weights[name].shape if name in weights else None
    found = held[name].shape if name in held else None
    if wanted != found:
      raise errors.CalmError(f"{path} takes {name} of shape {wanted}, the folder's is {found}")


def _check_graph(path: pathlib.Path) -> None:
  """Raises CalmError unless a graph can be read and its weights lie in the files beside it."""
  import onnx

  files.require_regular(path)
  try:
    graph = onnx.load(path, load_external_data=False).graph
  except Exception as error:  # protobuf's class of error differs by its version.
    reason = " ".join(str(error).split()) or type(error).__name__
    raise errors.CalmError(f"{path} is no ONNX graph: {reason}") from error
  for tensor in graph.initializer:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    if not facts:
      continue
    beside = path.parent / pathlib.PurePath(facts.get("location", "")).name
    try:
      end = int(facts.get("offset", 0)) + int(facts.get("length", 0))
    except ValueError as error:
      raise errors.CalmError(f"{path}: {tensor.name} lies nowhere: {error}") from error
    if not beside.is_file() or beside.stat().st_size < end:
      raise errors.CalmError(f"{path}: {tensor.name} lies in {beside}, which is missing or short")
