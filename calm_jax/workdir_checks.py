"""A workdir -> its checks, one part at a time."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from calm_jax import errors, files, seal, workdir
from calm_jax.running import loading
from calm_jax.training import checkpoint, failures, fingerprint, ledger, meta, reread

# Returns a line on the result; raises CalmError at a difference.
Check = Callable[[], str]


def checks(directory: str) -> Iterator[tuple[str, Check]]:
  """Yields (path within the workdir, check) for each part of a workdir.

  The parts are looked up lazily, so a caller that stops at the first error reads no damaged part.

  Raises:
    CalmError: if there is no workdir.
  """
  path = epath.Path(directory)
  if not workdir.exists(directory):
    raise errors.CalmError(f"no workdir at {directory!r} (config.json is missing)")
  yield seal.FILE, functools.partial(_seal, directory)
  yield "config.json", functools.partial(_config, directory)
  yield "origin.json", functools.partial(_origin, directory)
  origin = workdir.read_origin(directory)
  yield origin.tokenizer_file, functools.partial(_tokenizer, directory)
  for parent in seal.read(directory).parents:
    yield parent, functools.partial(_parent, directory, parent)
    for name, check in checks(str(path / parent)):
      yield f"{parent}/{name}", check
  for step in checkpoint.steps_in(directory):
    check = functools.partial(_checkpoint, directory, step)
    yield f"{checkpoint.DIRECTORY}/{step}", check
  for name in (workdir.METRICS, workdir.SAMPLES):
    if (path / name).exists():
      yield name, functools.partial(_lines, path / name)
  for name in (workdir.EVALUATION, workdir.TRADEOFF):
    if (path / name).exists():
      yield name, functools.partial(_figures, path / name)
  if (path / ledger.FOLDER).exists():
    yield ledger.FOLDER, functools.partial(_ledger, path)


def _seal(directory: str) -> str:
  return f"run {seal.read(directory).run[:8]}, format {seal.FORMAT_VERSION}"


def _config(directory: str) -> str:
  return f"as the run wrote it, stage {loading.read_run(directory).stage}"


def _origin(directory: str) -> str:
  return f"as the run wrote it, vocabulary {workdir.read_origin(directory).vocab_size:,}"


def _tokenizer(directory: str) -> str:
  origin = workdir.read_origin(directory)
  seal.require_tokenizer(directory, origin.tokenizer_file)
  return f"the run's own, {workdir.tokenizer(directory, origin).vocab_size:,} tokens"


def _parent(directory: str, name: str) -> str:
  """Compares a parent's weights with origin.json's fingerprint; its own `checks` do the rest."""
  seal.require_parents(directory)
  inner = str(epath.Path(directory) / name)
  steps = checkpoint.steps_in(inner)
  if not steps:
    raise errors.CalmError(f"{inner} has no checkpoint: put back the {name} that was there")
  weights = _verified(inner, steps[-1], seal.read(inner).bound)["params_fingerprint"]
  workdir.require_parent_weights(directory, workdir.read_origin(directory), name, weights)
  return f"the run's own, weights {weights}"


def _verified(workdir: str, step: int, bound: str) -> Mapping[str, Any]:
  """Reads a complete checkpoint on the host, checks it, and returns its meta.

  Args:
    workdir: path of the workdir.
    step: step of the checkpoint.
    bound: `bound` of the workdir's seal; empty for any.

  Raises:
    CalmError: if the checkpoint is damaged or can't be read.
  """
  place = epath.Path(files.absolute(workdir)) / checkpoint.DIRECTORY / str(step)
  try:
    metadata = ocp.JsonCheckpointHandler().restore(place / "meta")
    meta.require(metadata, place, bound)
    for name in ("params", "rest"):
      if f"{name}_fingerprint" in metadata:
        meta.require_fingerprint(metadata, name, fingerprint.digest(reread.lines(place / name)))
  except errors.CalmError:
    raise
  except Exception as error:  # Damage can raise any error of Orbax or TensorStore.
    raise errors.CalmError(f"{place} can't be read: {failures.first_line(error)}") from error
  if "data" in metadata:
    meta.Taken.of(metadata["data"], step)
  return metadata


def _checkpoint(directory: str, step: int) -> str:
  try:
    metadata = _verified(directory, step, seal.read(directory).bound)
  except errors.CalmError:
    if step in checkpoint.steps_in(directory):
      raise
    return "removed by the run in the meantime"
  names = [name for name in ("params", "rest") if f"{name}_fingerprint" in metadata]
  return f"intact: {', '.join(names)}, meta"


def _lines(path: epath.Path) -> str:
  lines = [line for line in files.read(path).split(b"\n") if line.strip()]
  bad = 0
  for line in lines:
    try:
      files.parse_json(line, "a line")
    except errors.CalmError:
      bad += 1
  return f"{len(lines) - bad} lines" + (f", {bad} more can't be read" if bad else "")


def _figures(path: epath.Path) -> str:
  return f"{len(files.read_json(path))} figures"


def _ledger(path: epath.Path) -> str:
  return f"{len(ledger.attempts(path))} attempts"
