"""Inputs -> parts: the files of globs, folders and the standard library, cut into spans."""

import dataclasses
import glob
import os
import pathlib
import platform
import sysconfig
from collections.abc import Iterator, Sequence

from calm_jax import errors, files
from calm_jax.data import readers
from calm_jax.data.readers import Span

STDLIB = "stdlib:"

_SKIPPED_FOLDERS = {"__pycache__"}
_STDLIB_SKIPPED_FOLDERS = _SKIPPED_FOLDERS | {
  "dist-packages",
  "idle_test",
  "lib-dynload",
  "site-packages",
  "test",
  "tests",
}
_MACHINE_SPECIFIC = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")


def find(inputs: Sequence[str]) -> tuple[list[str], list[Span]]:
  """Returns the name of each input, and all files of all inputs in a fixed order.

  An input is a glob of files and folders, or `stdlib:`, the standard library of the
  running Python. A file that two inputs match belongs to the first of them.

  Raises:
    CalmError: if an input matches nothing, or a file of unknown suffix.
  """
  names, spans, seen = [], [], set()
  for source, item in enumerate(inputs):
    name, matches = _find_stdlib(source) if item == STDLIB else _find_files(item, source)
    names.append(name)
    spans += [span for span in matches if span.path not in seen]
    seen.update(span.path for span in matches)
  return names, spans


def require_unchanged(spans: Sequence[Span]) -> None:
  """Raises CalmError if the size or the time of a file changed since `find` saw it."""
  for span in spans:
    current = _span(span.path, span.source) if span.mtime_ns else span
    if (current.size, current.mtime_ns) != (span.size, span.mtime_ns):
      raise errors.CalmError(f"{span.path} changed while it was read: run prepare again")


def split(spans: Sequence[Span], part_bytes: int) -> list[tuple[Span, ...]]:
  """Returns the spans in order, in parts of about `part_bytes`; small files share a part."""
  parts, part, size = [], [], 0
  for span in (piece for file in spans for piece in _pieces(file, part_bytes)):
    if part and size + span.num_bytes > part_bytes:
      parts.append(tuple(part))
      part, size = [], 0
    part.append(span)
    size += span.num_bytes
  return [*parts, tuple(part)] if part else parts


def _pieces(span: Span, part_bytes: int) -> Iterator[Span]:
  """Yields a file in spans of at most `part_bytes`, or in one where its format requires it."""
  compressed = pathlib.Path(span.path).suffix in readers.COMPRESSIONS
  if compressed or not readers.READERS[span.format].splittable:
    yield span
    return
  for start in range(0, span.size, part_bytes):
    yield dataclasses.replace(span, start=start, stop=min(start + part_bytes, span.size))


def _find_files(pattern: str, source: int) -> tuple[str, list[Span]]:
  """Returns the name of a glob and the files it matches, with those in matching folders."""
  paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
  if not paths:
    raise errors.CalmError(f"no such file: --input={pattern} matches nothing")
  spans = []
  for path in paths:
    matches = _walk(path, _SKIPPED_FOLDERS) if os.path.isdir(path) else [path]
    spans += [_span(file, source) for file in matches]
  if not spans:
    suffixes = ", ".join(_known_suffixes())
    raise errors.CalmError(f"no text in --input={pattern}: a folder is searched for {suffixes}")
  return pathlib.PurePath(pattern).name, spans


def _find_stdlib(source: int) -> tuple[str, list[Span]]:
  """Returns the name of the standard library, with its version, and its files."""
  root = sysconfig.get_path("stdlib")
  spans = []
  for path in _walk(root, _STDLIB_SKIPPED_FOLDERS):
    relative = pathlib.PurePath(path).relative_to(root)
    if relative.suffix != ".py" or any(p.startswith(_MACHINE_SPECIFIC) for p in relative.parts):
      continue
    # The topics are read as prose, not a second time as the source of a dict.
    topics = relative.as_posix() == "pydoc_data/topics.py"
    kind = readers.TOPICS if topics else ".py"
    spans.append(Span(path, kind, source, os.path.getsize(path), mtime_ns=0))
  return f"{STDLIB}python-{platform.python_version()}", spans


def _walk(root: str, skipped: set[str]) -> list[str]:
  """Returns the visible files below `root` of known format, sorted."""
  paths = []

  def raise_error(error: OSError) -> None:
    raise errors.CalmError(f"can't read {error.filename}: {error.strerror}") from error

  for folder, subfolders, names in os.walk(root, onerror=raise_error):
    subfolders[:] = (name for name in subfolders if name not in skipped and name[0] != ".")
    texts = (name for name in names if name[0] != "." and _format(name) in readers.READERS)
    paths += [os.path.join(folder, name) for name in texts]
  return sorted(paths, key=lambda path: pathlib.PurePath(path).relative_to(root).as_posix())


def _span(path: str, source: int) -> Span:
  """Returns the span of a complete file."""
  if _format(path) not in readers.READERS:
    raise errors.CalmError(
      f"{path} has an unknown suffix: known are {', '.join(_known_suffixes())}, each also with "
      f"{' or '.join(readers.COMPRESSIONS)}"
    )
  files.require_regular(path)
  try:
    status = os.stat(path)
  except OSError as error:
    raise errors.CalmError(f"can't read {path}: {error.strerror}") from error
  return Span(os.path.abspath(path), _format(path), source, status.st_size, status.st_mtime_ns)


def _format(path: str) -> str:
  """Returns the suffix that names the format: `.jsonl` for x.jsonl.gz."""
  suffixes = pathlib.PurePath(path).suffixes
  if suffixes and suffixes[-1] in readers.COMPRESSIONS:
    suffixes.pop()
  return suffixes[-1].lower() if suffixes else ""


def _known_suffixes() -> list[str]:
  return [suffix for suffix in readers.READERS if suffix.startswith(".")]
