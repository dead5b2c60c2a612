"""Files that are there whole or not at all, logs, and JSON that every reader takes."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from calm_jax import errors


def absolute(path: epath.PathLike) -> str:
  """Returns a local path from the root on, and a bucket's URL as it is."""
  return os.fspath(path) if "://" in os.fspath(path) else os.path.abspath(path)


def write(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file, or leaves the one that was there.

  Raises:
    CalmError: if it can't be written.
  """
  target = epath.Path(path)
  temporary = target.parent / f"{target.name}.tmp"
  try:
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(target)
  except OSError as error:
    raise errors.CalmError(f"can't write {target}: {error}") from error


def append(path: epath.PathLike, content: str) -> None:
  """Appends to a file, which may not be there yet.

  Raises:
    CalmError: if it can't be written.
  """
  try:
    with epath.Path(path).open("a") as file:
      file.write(content)
  except OSError as error:
    raise errors.CalmError(f"can't write {path}: {error}") from error


def finite(figures: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the figures with None for NaN and infinities, which JSON does not know."""
  return {
    name: None if isinstance(value, float) and not math.isfinite(value) else value
    for name, value in figures.items()
  }


def to_json(values: Mapping[str, Any]) -> str:
  """Returns indented JSON that ends in a newline.

  Raises:
    ValueError: for NaN and infinities; see `finite`.
  """
  return json.dumps(values, indent=2, allow_nan=False) + "\n"


def require_reachable(path: str) -> None:
  """Raises CalmError where it can't even be told whether there is a file or folder at `path`."""
  try:
    epath.Path(path).exists()
  except Exception as error:  # A bucket's client raises errors of its own.
    reason = " ".join(str(error).split()) or type(error).__name__
    advice = ": pip install 'etils[epath-gcs]'" if isinstance(error, ImportError) else ""
    raise errors.CalmError(f"can't reach {path}: {reason}{advice}") from error
