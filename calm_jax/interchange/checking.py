"""An exported folder -> its checks, one function each.

A check returns a line on the result and raises CalmError at the first difference. It accepts the
folders of all export formats, and folders of other frameworks that can be imported.
"""

import importlib.util
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jax import export

from calm_jax import errors, files
from calm_jax.interchange import checksums, names, reading, tensors


def is_exported(folder: pathlib.Path) -> bool:
  """Returns whether a folder was exported or can be imported, and is not a workdir."""
  has_weights = any((folder / name).exists() for name in tensors.WEIGHTS)
  return (folder / checksums.NAME).exists() or (
    has_weights and not (folder / "origin.json").exists()
  )


def sums(folder: pathlib.Path) -> str:
  """Checks that each file has its recorded SHA-256, and that none is missing or added."""
  count = checksums.check(folder, reading.USED)
  return f"{count} files" if count else f"not checked: there is no {checksums.NAME}"


def headers(folder: pathlib.Path) -> str:
  """Checks that weight files have a valid header and are not truncated."""
  count = sum(len(tensors.open_folder(subfolder)) for subfolder in _with_weights(folder))
  return f"{count} tensors" if count else "no weights by name"


def index(folder: pathlib.Path) -> str:
  """Checks that each file holds exactly the tensors that the index assigns to it."""
  indexed = [
    subfolder for subfolder in _with_weights(folder) if any(subfolder.glob("*.index.json"))
  ]
  shards = {
    stored.file for subfolder in indexed for stored in tensors.open_folder(subfolder).values()
  }
  return f"{len(shards)} shards" if shards else "no shards"


def shapes(folder: pathlib.Path) -> str:
  """Checks that the tensors fit the model of config.json, or the exported programs."""
  compiled, graphs = sorted(folder.glob("*.stablehlo")), sorted(folder.glob("*.onnx"))
  if graphs and importlib.util.find_spec("onnx") is None:
    return "not checked: onnx is not installed: pip install -e '.[onnx]'"
  for path in compiled:
    _check_compiled(path, tensors.open_folder(folder))
  for path in graphs:
    _check_graph(path)
  if compiled or graphs:
    return f"{len(compiled) + len(graphs)} programs"
  for subfolder in _with_weights(folder):
    reading.check(subfolder)
  return "as config.json says"


def values(folder: pathlib.Path) -> str:
  """Checks that all weights are finite, one tensor at a time."""
  count = 0
  for subfolder in _with_weights(folder):
    for name, stored in tensors.open_folder(subfolder).items():
      if stored.dtype in tensors.FLOATS:
        names.require_finite(stored.read(), name, subfolder)
        count += int(np.prod(stored.shape))
  return f"{count:,} weights"


# In the order in which they run; later checks rely on earlier ones.
CHECKS: Mapping[str, Callable[[pathlib.Path], str]] = {
  "checksums": sums,
  "headers": headers,
  "index": index,
  "shapes": shapes,
  "values": values,
}


def _with_weights(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the folder and its subfolders, as far as they hold named weights."""
  for subfolder in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
    if any((subfolder / name).exists() for name in tensors.WEIGHTS):
      yield subfolder


def _check_compiled(path: pathlib.Path, tensor_of: Mapping[str, tensors.Stored]) -> None:
  """Raises CalmError unless an artefact can be read and accepts the folder's weights."""
  try:
    exported = export.deserialize(bytearray(files.read(path)))
    (weights, *_), _ = exported.in_tree.unflatten(exported.in_avals)
  except errors.CalmError:
    raise
  except Exception as error:  # A damaged flatbuffer can raise any error.
    reason = " ".join(str(error).split()) or type(error).__name__
    raise errors.CalmError(f"{path} is not an artefact of jax.export: {reason}") from error
  for name in sorted(weights.keys() | tensor_of.keys()):
    expected = weights[name].shape if name in weights else None
    stored = tensor_of[name].shape if name in tensor_of else None
    if expected != stored:
      raise errors.CalmError(
        f"{path} takes {name} of shape {expected}, but the folder has {stored}"
      )


def _check_graph(path: pathlib.Path) -> None:
  """Raises CalmError unless a graph can be read and the files next to it hold its weights."""
  import onnx

  files.require_regular(path)
  try:
    graph = onnx.load(path, load_external_data=False).graph
  except Exception as error:  # The class of protobuf's error depends on its version.
    reason = " ".join(str(error).split()) or type(error).__name__
    raise errors.CalmError(f"{path} is not an ONNX graph: {reason}") from error
  for tensor in graph.initializer:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if not entries:
      continue
    file = path.parent / pathlib.PurePath(entries.get("location", "")).name
    try:
      end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    except ValueError as error:
      raise errors.CalmError(f"{path}: {tensor.name} has no valid location: {error}") from error
    if not file.is_file() or file.stat().st_size < end:
      raise errors.CalmError(f"{path}: {tensor.name} is in {file}, which is missing or short")
