"""Files that are there whole or not at all, logs, and JSON that every reader takes."""

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from typing import Any

from etils import epath

from calm_jax import errors


def absolute(path: epath.PathLike) -> str:
  """Returns a local path from the root on, and a bucket's URL as it is."""
  return os.path.abspath(path) if is_local(path) else os.fspath(path)


def is_local(path: epath.PathLike) -> bool:
  """Tells whether a path is of this machine's file system, and not a bucket's URL."""
  return "://" not in os.fspath(path)


def sync(path: epath.PathLike) -> None:
  """Returns when a local file or folder is on the disk; a bucket's are there once written.

  A folder holds the names of its files: without it a new file can be lost at a power cut.
  """
  if not is_local(path):
    return
  try:
    descriptor = os.open(path, os.O_RDONLY)
  except PermissionError:  # A folder that can't be listed can't be synced.
    return
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Of systems that sync no folders.
      raise
  finally:
    os.close(descriptor)


def write(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file, or leaves the one that was there; on the disk when it returns.

  Raises:
    CalmError: if it can't be written, or a device or a pipe is there, whose place it would take.
  """
  require_regular(path)
  target = epath.Path(path)
  # Of this process: another one may be writing the same file.
  temporary = target.parent / f"{target.name}.{os.getpid()}.tmp"
  try:
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(temporary)
    temporary.replace(target)
    sync(target.parent)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise errors.CalmError(f"can't write {target}: {error}") from error


def require_regular(path: epath.PathLike) -> None:
  """Raises CalmError where a local path is there and is no regular file: a pipe, a device.

  Reading one could wait for ever, or never end.
  """
  if not is_local(path):
    return
  try:
    mode = os.stat(path).st_mode
  except (OSError, ValueError):
    return  # Whoever opens it tells why it can't be.
  if not stat.S_ISREG(mode):
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
    raise errors.CalmError(f"{os.fspath(path)} is {kind}, not a file")


def read(path: epath.PathLike) -> bytes:
  """Returns the bytes of a file.

  Raises:
    CalmError: if it is no regular file or can't be read.
  """
  require_regular(path)
  try:
    return epath.Path(path).read_bytes()
  except (OSError, ValueError) as error:  # ValueError: a path that no system takes.
    raise errors.CalmError(f"can't read {os.fspath(path)}: {error}") from error


def digest(path: epath.PathLike) -> str:
  """Returns the SHA-256 of a file's bytes, as hexadecimal digits.

  Raises:
    CalmError: if it is no regular file or can't be read.
  """
  require_regular(path)
  try:
    with epath.Path(path).open("rb") as file:
      found = hashlib.sha256()
      while block := file.read(2**20):
        found.update(block)
      return found.hexdigest()
  except (OSError, ValueError) as error:
    raise errors.CalmError(f"can't read {os.fspath(path)}: {error}") from error


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
  """Returns the object that JSON text holds.

  Args:
    where: names the text in errors: a path, or a path and a line.

  Raises:
    CalmError: if it is no JSON, nested deeper than can be read, or no object.
  """
  try:
    values = json.loads(text)
  except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError.
    reason = "nested too deep" if isinstance(error, RecursionError) else error
    raise errors.CalmError(f"{where} is no valid JSON: {reason}") from error
  if not isinstance(values, dict):
    raise errors.CalmError(f"{where} must hold a JSON object, got {type(values).__name__}")
  return values


def read_json(path: epath.PathLike) -> dict[str, Any]:
  """Returns the object that a JSON file holds.

  Raises:
    CalmError: if the file can't be read, or as `parse_json`.
  """
  return parse_json(read(path), os.fspath(path))


def append(path: epath.PathLike, content: str) -> None:
  """Appends to a file, which may not be there yet, in one piece: no other's lies in between.

  Raises:
    CalmError: if it can't be written, or is a device or a pipe, which could wait for ever.
  """
  require_regular(path)
  try:
    with epath.Path(path).open("ab") as file:
      file.write(content.encode())
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
    if is_local(path):  # Its `exists` takes what it may not look at for missing.
      with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(path)
    else:
      epath.Path(path).exists()
  except Exception as error:  # A bucket's client raises errors of its own.
    reason = " ".join(str(error).split()) or type(error).__name__
    advice = ": pip install 'etils[epath-gcs]'" if isinstance(error, ImportError) else ""
    raise errors.CalmError(f"can't reach {path}: {reason}{advice}") from error
