"""Atomic file writes, appends, checksums, and JSON that is valid for every reader."""

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
  """Returns the absolute form of a local path; a bucket's URL is returned unchanged."""
  return os.path.abspath(path) if is_local(path) else os.fspath(path)


def is_local(path: epath.PathLike) -> bool:
  """Returns whether a path is in this machine's file system, not a bucket's URL."""
  return "://" not in os.fspath(path)


def sync(path: epath.PathLike) -> None:
  """Flushes a local file or folder to disk; a bucket needs no flush.

  A folder holds the names of its files: if it is not flushed, a power cut can lose a new file.
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
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # The file system can't sync folders.
      raise
  finally:
    os.close(descriptor)


def write(path: epath.PathLike, content: str | bytes) -> None:
  """Replaces a file atomically and flushes it to disk; on an error the old file stays.

  Raises:
    CalmError: if the file can't be written, or `path` is a device or a pipe.
  """
  require_regular(path)
  target = epath.Path(path)
  # The name holds the process id because another process may be writing the same file.
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
  """Raises CalmError if a local path exists but is not a regular file: a folder, pipe or device.

  Reading a pipe could block, and reading a device could never end.
  """
  if not is_local(path):
    return
  try:
    mode = os.stat(path).st_mode
  except (OSError, ValueError):
    return  # Opening the file reports the reason.
  if not stat.S_ISREG(mode):
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
    raise errors.CalmError(f"{os.fspath(path)} is {kind}, not a file")


def read(path: epath.PathLike) -> bytes:
  """Returns the bytes of a file.

  Raises:
    CalmError: if it is not a regular file or can't be read.
  """
  require_regular(path)
  try:
    return epath.Path(path).read_bytes()
  except (OSError, ValueError) as error:  # ValueError: the path is not valid.
    raise errors.CalmError(f"can't read {os.fspath(path)}: {error}") from error


def digest(path: epath.PathLike) -> str:
  """Returns the SHA-256 of a file's bytes, as hexadecimal digits.

  Raises:
    CalmError: if it is not a regular file or can't be read.
  """
  require_regular(path)
  try:
    with epath.Path(path).open("rb") as file:
      sha256 = hashlib.sha256()
      while block := file.read(2**20):
        sha256.update(block)
      return sha256.hexdigest()
  except (OSError, ValueError) as error:
    raise errors.CalmError(f"can't read {os.fspath(path)}: {error}") from error


def require_digest(path: epath.PathLike, expected: str, claim: str, advice: str) -> None:
  """Raises CalmError unless a file's bytes have the SHA-256 `expected`.

  Args:
    claim: source of `expected`, for the message, such as "manifest.json says".
    advice: what to do about a difference.
  """
  actual = digest(path)
  if actual != expected:
    raise errors.CalmError(
      f"{os.fspath(path)} has SHA-256 {actual[:16]}, but {claim} {expected[:16]}: {advice}"
    )


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
  """Returns the object in a JSON text.

  Args:
    text: the JSON text.
    where: names the text in errors: a path, or a path and a line.

  Raises:
    CalmError: if the text is not valid JSON, nested too deep, or not an object.
  """
  try:
    values = json.loads(text)
  except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError.
    reason = "nested too deep" if isinstance(error, RecursionError) else error
    raise errors.CalmError(f"{where} is not valid JSON: {reason}") from error
  if not isinstance(values, dict):
    raise errors.CalmError(f"{where} must hold a JSON object, got {type(values).__name__}")
  return values


def read_json(path: epath.PathLike) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Raises:
    CalmError: if the file can't be read; see also `parse_json`.
  """
  return parse_json(read(path), os.fspath(path))


def append(path: epath.PathLike, content: str) -> None:
  """Appends to a file in one write, so that lines of several writers do not mix.

  The file is created if it does not exist.

  Raises:
    CalmError: if the file can't be written, or is a device or a pipe, which could block.
  """
  require_regular(path)
  try:
    with epath.Path(path).open("ab") as file:
      file.write(content.encode())
  except OSError as error:
    raise errors.CalmError(f"can't write {path}: {error}") from error


def finite(figures: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the figures with None in place of NaN and infinities, which JSON lacks."""
  return {
    name: None if isinstance(value, float) and not math.isfinite(value) else value
    for name, value in figures.items()
  }


def to_json(values: Mapping[str, Any]) -> str:
  """Returns indented JSON that ends in a newline.

  Raises:
    ValueError: if a value is NaN or infinite; see `finite`.
  """
  return json.dumps(values, indent=2, allow_nan=False) + "\n"


def require_reachable(path: str) -> None:
  """Raises CalmError if it can't be determined whether `path` exists."""
  try:
    if is_local(path):  # epath's `exists` returns False if permission is denied.
      with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(path)
    else:
      epath.Path(path).exists()
  except Exception as error:  # Clients of buckets have their own error classes.
    reason = " ".join(str(error).split()) or type(error).__name__
    advice = ": pip install 'etils[epath-gcs]'" if isinstance(error, ImportError) else ""
    raise errors.CalmError(f"can't reach {path}: {reason}{advice}") from error
