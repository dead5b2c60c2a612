"""Text -> documents: files, folders and the standard library, as streams of UTF-8 text."""

import dataclasses
import glob
import importlib
import io
import itertools
import json
import os
import pathlib
import platform
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import IO, NamedTuple

from calm_jax import errors

STDLIB = "stdlib:"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # Suffix -> pyarrow's name.

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
_TOPICS = "documentation topics"  # A format of its own: no file suffix leads to it.


@dataclasses.dataclass(frozen=True)
class Span:
  """Bytes [start, stop) of a source file, for one reader; stop None is the end.

  Attributes:
    path: of the file. format: its key in READERS. source: the index of the input
      it comes from.
    size: of the whole file in bytes. mtime_ns: 0 where the input has a version.
  """

  path: str
  format: str
  source: int
  size: int
  mtime_ns: int
  start: int = 0
  stop: int | None = None

  @property
  def num_bytes(self) -> int:
    """Bytes of the file in this span, as stored."""
    return (self.size if self.stop is None else self.stop) - self.start


@dataclasses.dataclass(frozen=True)
class BadLine:
  """A line that holds no document. where: file:line. reason: what is wrong with it."""

  where: str
  reason: str


Item = str | BadLine


class Reader(NamedTuple):
  """How a format is read.

  Attributes:
    read: yields the documents of a span; the string is the field or column.
    splittable: whether any span of an uncompressed file can be read by itself.
  """

  read: Callable[[Span, str], Iterator[Item]]
  splittable: bool = False


def find(inputs: Sequence[str]) -> tuple[list[str], list[Span]]:
  """Returns a name for each input, and every file of theirs, in a fixed order.

  An input is a glob of files and folders, or `stdlib:`, the standard library of
  the running Python. A file that two inputs match belongs to the first.

  Raises:
    CalmError: if an input matches nothing, or a file of unknown suffix.
  """
  names, spans, seen = [], [], set()
  for source, item in enumerate(inputs):
    name, found = _find_stdlib(source) if item == STDLIB else _find_files(item, source)
    names.append(name)
    spans += [span for span in found if span.path not in seen]
    seen.update(span.path for span in found)
  return names, spans


def documents(span: Span, field: str) -> Iterator[Item]:
  """Yields the documents of a span that are not empty, and its bad lines.

  Raises:
    CalmError: if the file can't be read: gone, truncated, not UTF-8, no such column.
  """
  try:
    for item in READERS[span.format].read(span, field):
      if item:
        yield item
  except errors.CalmError:
    raise
  except (OSError, ValueError, NotImplementedError) as error:
    reason = "not UTF-8: " if isinstance(error, UnicodeDecodeError) else ""
    raise errors.CalmError(
      f"can't read {span.path}: {reason}{' '.join(str(error).split())}"
    ) from error


def split(spans: Sequence[Span], part_bytes: int) -> list[tuple[Span, ...]]:
  """Returns the spans in order, in parts of about `part_bytes`; small files share one."""
  parts, part, size = [], [], 0
  for span in (piece for whole in spans for piece in _pieces(whole, part_bytes)):
    if part and size + span.num_bytes > part_bytes:
      parts.append(tuple(part))
      part, size = [], 0
    part.append(span)
    size += span.num_bytes
  return [*parts, tuple(part)] if part else parts


def _pieces(span: Span, part_bytes: int) -> Iterator[Span]:
  """Yields a file in spans of at most `part_bytes`, or whole where its format needs it."""
  compressed = pathlib.Path(span.path).suffix in COMPRESSIONS
  if compressed or not READERS[span.format].splittable:
    yield span
    return
  for start in range(0, span.size, part_bytes):
    yield dataclasses.replace(span, start=start, stop=min(start + part_bytes, span.size))


def _find_files(pattern: str, source: int) -> tuple[str, list[Span]]:
  paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
  if not paths:
    raise errors.CalmError(f"no such file: --input={pattern} matches nothing")
  spans = []
  for path in paths:
    found = _walk(path, _SKIPPED_FOLDERS) if os.path.isdir(path) else [path]
    spans += [_span(file, source) for file in found]
  if not spans:
    known = ", ".join(_known_suffixes())
    raise errors.CalmError(f"no text in --input={pattern}: a folder is searched for {known}")
  return pathlib.PurePath(pattern).name, spans


def _find_stdlib(source: int) -> tuple[str, list[Span]]:
  root = sysconfig.get_path("stdlib")
  spans = []
  for path in _walk(root, _STDLIB_SKIPPED_FOLDERS):
    relative = pathlib.PurePath(path).relative_to(root)
    if relative.suffix != ".py" or any(p.startswith(_MACHINE_SPECIFIC) for p in relative.parts):
      continue
    # The topics are read as prose, not a second time as the source of a dict.
    topics = relative.as_posix() == "pydoc_data/topics.py"
    spans.append(Span(path, _TOPICS if topics else ".py", source, os.path.getsize(path), 0))
  return f"{STDLIB}python-{platform.python_version()}", spans


def _walk(root: str, skipped: set[str]) -> list[str]:
  """Returns the files below `root` of known format, without hidden ones, sorted."""
  found = []
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = (name for name in subfolders if name not in skipped and name[0] != ".")
    known = (name for name in names if name[0] != "." and _format(name) in READERS)
    found += [os.path.join(folder, name) for name in known]
  return sorted(found, key=lambda path: pathlib.PurePath(path).relative_to(root).as_posix())


def _span(path: str, source: int) -> Span:
  if _format(path) not in READERS:
    raise errors.CalmError(
      f"{path} has a suffix that is not known: {', '.join(_known_suffixes())}, and "
      f"{' or '.join(COMPRESSIONS)} after any of them"
    )
  try:
    status = os.stat(path)
  except OSError as error:
    raise errors.CalmError(f"can't read {path}: {error.strerror}") from error
  return Span(os.path.abspath(path), _format(path), source, status.st_size, status.st_mtime_ns)


def _format(path: str) -> str:
  """Returns the suffix that tells the format: `.jsonl` for x.jsonl.gz."""
  suffixes = pathlib.PurePath(path).suffixes
  if suffixes and suffixes[-1] in COMPRESSIONS:
    suffixes.pop()
  return suffixes[-1].lower() if suffixes else ""


def _known_suffixes() -> list[str]:
  return [suffix for suffix in READERS if suffix.startswith(".")]


def _open(path: str) -> IO[bytes]:
  compression = COMPRESSIONS.get(pathlib.PurePath(path).suffix)
  if compression is None:
    return open(path, "rb")
  # Unlike the zstandard package, pyarrow says when a stream is truncated. It is
  # imported here because it takes long, and most readers do without.
  import pyarrow as pa

  return io.BufferedReader(pa.input_stream(path, compression=compression), 2**20)  # pyright: ignore[reportArgumentType]


def _read_whole(span: Span, field: str) -> Iterator[Item]:
  """Yields the file as one document."""
  del field
  with _open(span.path) as file:
    yield file.read().decode("utf-8")


def _read_json_lines(span: Span, field: str) -> Iterator[Item]:
  """Yields a field of the lines that start within the span."""
  with _open(span.path) as file:
    position, lines_before = 0, 0
    if span.start:
      # A line belongs to the span of its first byte, so the one cut by the start does not.
      file.seek(span.start - 1)
      position = span.start - 1 + len(file.readline())
      lines_before = None
    first = position
    for number, line in enumerate(file, start=1):
      if span.stop is not None and position >= span.stop:
        return
      position += len(line)
      if not line.strip():
        continue
      try:
        yield _field_of(line, field)
      except (ValueError, RecursionError) as error:
        if lines_before is None:
          lines_before = _count_lines(span.path, first)
        yield BadLine(f"{span.path}:{lines_before + number}", str(error))


def _field_of(line: bytes, field: str) -> str:
  """Returns the text in a field of a JSON object.

  Raises:
    ValueError: with the reason, if there is none that can be written as UTF-8.
  """
  try:
    record = json.loads(line.decode("utf-8"))
  except UnicodeDecodeError as error:
    raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
  except json.JSONDecodeError as error:
    raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
  if not isinstance(record, dict) or field not in record:
    raise ValueError(f"no field {field!r} (--text_field names it)")
  text = record[field]
  if not isinstance(text, str):
    raise ValueError(f"field {field!r} holds {type(text).__name__}, not text")
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"field {field!r} holds half a surrogate pair") from error
  return text


def _count_lines(path: str, stop: int) -> int:
  count = 0
  with open(path, "rb") as file:
    while file.tell() < stop:
      count += file.read(min(2**20, stop - file.tell())).count(b"\n")
  return count


def _read_parquet(span: Span, field: str) -> Iterator[Item]:
  """Yields a column of text; a null is a bad line, counted in rows."""
  import pyarrow as pa
  from pyarrow import parquet

  with parquet.ParquetFile(span.path) as file:
    schema = file.schema_arrow
    if field not in schema.names:
      raise errors.CalmError(
        f"{span.path} has no column {field!r} (--text_field names it) but {', '.join(schema.names)}"
      )
    kind = schema.field(field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
      raise errors.CalmError(f"column {field!r} of {span.path} holds {kind}, not text")
    batches = file.iter_batches(batch_size=1024, columns=[field])
    for row, value in enumerate(itertools.chain.from_iterable(b.column(0) for b in batches), 1):
      text = value.as_py()
      yield BadLine(f"{span.path}:{row}", "null, not text") if text is None else text


def _read_topics(span: Span, field: str) -> Iterator[Item]:
  """Yields what `help()` says on each topic of the language, by topic name."""
  del span, field
  topics = importlib.import_module("pydoc_data.topics").topics
  for name in sorted(topics):
    yield topics[name]


_ONE_DOCUMENT = (
  ".txt .md .rst .tex .html .py .pyi .c .h .cc .cpp .hpp .cu .java .js .ts .go .rs .rb .php .cs "
  ".swift .kt .scala .jl .r .lua .pl .sh .sql .hs .ml .clj .ex .zig"
)

# A new format is a new row.
READERS = {
  ".jsonl": Reader(_read_json_lines, splittable=True),
  ".parquet": Reader(_read_parquet),
  **dict.fromkeys(_ONE_DOCUMENT.split(), Reader(_read_whole)),
  _TOPICS: Reader(_read_topics),
}
