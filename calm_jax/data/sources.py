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

from calm_jax import errors, files

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

# What is held in memory at once, whatever a compressed file unpacks to.
_DOCUMENT_BYTES = 2**30  # Of a file that is one document.
_LINE_BYTES = 2**27  # Of a line of JSON, and of a value of Parquet.
_READ_BYTES = 2**20


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
    CalmError: if the file can't be read: gone, truncated, not UTF-8, no such column, or
      a document of more than 1 GiB.
  """
  try:
    for item in READERS[span.format].read(span, field):
      if item:
        yield item
  except errors.CalmError:
    raise
  except (OSError, ValueError, NotImplementedError, MemoryError) as error:
    reason = "not UTF-8: " if isinstance(error, UnicodeDecodeError) else ""
    raise errors.CalmError(
      f"can't read {span.path}: {reason}{' '.join(str(error).split())}"
    ) from error


def require_unchanged(spans: Sequence[Span]) -> None:
  """Raises CalmError where a file is no longer as it was found."""
  for span in spans:
    now = _span(span.path, span.source) if span.mtime_ns else span
    if (now.size, now.mtime_ns) != (span.size, span.mtime_ns):
      raise errors.CalmError(f"{span.path} changed while it was read: run prepare again")


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

  def unreadable(error: OSError) -> None:
    raise errors.CalmError(f"can't read {error.filename}: {error.strerror}") from error

  for folder, subfolders, names in os.walk(root, onerror=unreadable):
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
  files.require_regular(path)
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
  files.require_regular(path)  # It may have been one when it was found.
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
  yield _content(span.path).decode("utf-8")


def _content(path: str) -> bytearray:
  """Returns the bytes of a file, ValueError where they are more than a document may have."""
  content = bytearray()
  with _open(path) as file:
    while block := file.read(_READ_BYTES):
      content += block
      if len(content) > _DOCUMENT_BYTES:
        raise ValueError(
          f"it holds more than {_DOCUMENT_BYTES:,} bytes, the most a document may have: cut it "
          "into several files"
        )
  return content


def _read_json_lines(span: Span, field: str) -> Iterator[Item]:
  """Yields a field of the lines that start within the span."""
  with _open(span.path) as file:
    first, lines_before = 0, 0
    if span.start:
      # A line belongs to the span of its first byte, so the one cut by the start does not.
      file.seek(span.start - 1)
      first, lines_before = span.start - 1 + _skip_line(file, span.num_bytes + 1), None
    position = first
    for number in itertools.count(1):
      if span.stop is not None and position >= span.stop:
        return
      line = file.readline(_LINE_BYTES + 1)
      if not line:
        return
      position += len(line)
      if not line.strip():
        continue
      try:
        item = _field_of(line, field)
      except ValueError as error:
        if lines_before is None:
          lines_before = _count_lines(span.path, first)
        item = BadLine(f"{span.path}:{lines_before + number}", str(error))
      yield item
      if len(line) > _LINE_BYTES:  # After the yield: who stops at a bad line need not read it.
        position += _skip_line(file, None)


def _skip_line(file: IO[bytes], limit: int | None) -> int:
  """Returns the bytes up to the end of a line, read and forgotten, or `limit` if none ends."""
  skipped = 0
  while limit is None or skipped < limit:
    size = _READ_BYTES if limit is None else min(_READ_BYTES, limit - skipped)
    block = file.readline(size)
    skipped += len(block)
    if not block or block.endswith(b"\n"):
      break
  return skipped


def _field_of(line: bytes, field: str) -> str:
  """Returns the text in a field of a JSON object.

  Raises:
    ValueError: with the reason, if there is none that can be written as UTF-8.
  """
  if len(line) > _LINE_BYTES:
    raise ValueError(f"longer than {_LINE_BYTES:,} bytes, the most a line may have")
  try:
    record = json.loads(line.decode("utf-8"))
  except UnicodeDecodeError as error:
    raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
  except json.JSONDecodeError as error:
    raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
  except RecursionError as error:
    raise ValueError("JSON nested too deep") from error
  except ValueError as error:  # Python reads no integer of more than 4,300 digits.
    raise ValueError(f"JSON that can't be read ({str(error).partition(':')[0]})") from error
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

  files.require_regular(span.path)
  try:
    with parquet.ParquetFile(span.path) as file:
      _require_text(span.path, file.schema_arrow, field)
    # Values are kept as indices of a dictionary: a long one that a small file repeats a
    # million times is in memory once.
    with parquet.ParquetFile(
      span.path, read_dictionary=[field], page_checksum_verification=True
    ) as file:
      batches = file.iter_batches(batch_size=1024, columns=[field])
      values = itertools.chain.from_iterable(b.column(0) for b in batches)
      for row, value in enumerate(values, 1):
        yield _value_of(f"{span.path}:{row}", value)
  except (pa.ArrowException, MemoryError) as error:
    raise ValueError(str(error) or type(error).__name__) from error


def _require_text(path: str, schema, field: str) -> None:
  """Raises CalmError unless a column of Parquet is there and holds text."""
  import pyarrow as pa

  if field not in schema.names:
    raise errors.CalmError(
      f"{path} has no column {field!r} (--text_field names it) but {', '.join(schema.names)}"
    )
  kind = schema.field(field).type
  kind = kind.value_type if pa.types.is_dictionary(kind) else kind  # As some files say themselves.
  if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
    raise errors.CalmError(f"column {field!r} of {path} holds {kind}, not text")


def _value_of(where: str, value) -> Item:
  """Returns the text of a value of Parquet, or why it is none."""
  try:
    text = value.as_py()
  except UnicodeDecodeError as error:
    return BadLine(where, f"not UTF-8 ({error.reason} at byte {error.start})")
  if text is None:
    return BadLine(where, "null, not text")
  if len(text) > _LINE_BYTES:
    return BadLine(where, f"longer than {_LINE_BYTES:,} letters, the most a value may have")
  return text


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
