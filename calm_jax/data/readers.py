"""Files -> documents: each format as a stream of UTF-8 text."""

import dataclasses
import importlib
import io
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from calm_jax import errors, files

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # Suffix -> pyarrow's name.
TOPICS = "documentation topics"  # A format without a file suffix; `sources` assigns it.

# Limits on items in memory, which also bound what a compressed file unpacks to.
_DOCUMENT_BYTES = 2**30  # Per file that is one document.
_LINE_BYTES = 2**27  # Per line of JSON and per value of Parquet.
_READ_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Span:
  """Bytes [start, stop) of a source file, read by one reader.

  Attributes:
    path: path of the file.
    format: key of the file's format in READERS.
    source: index of the input that the file comes from.
    size: size of the complete file in bytes.
    mtime_ns: modification time; 0 for inputs that have a version.
    start, stop: the range; a stop of None is the end of the file.
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
  """A line that holds no document.

  Attributes:
    where: file:line.
    reason: what is wrong with the line.
  """

  where: str
  reason: str


Item = str | BadLine


class Reader(NamedTuple):
  """How a format is read.

  Attributes:
    read: yields the documents of a span, given the name of the text field or column.
    splittable: whether any span of an uncompressed file can be read on its own.
  """

  read: Callable[[Span, str], Iterator[Item]]
  splittable: bool = False


def documents(span: Span, field: str) -> Iterator[Item]:
  """Yields the non-empty documents of a span and its bad lines.

  Raises:
    CalmError: if the file can't be read: it is gone, truncated or not UTF-8, lacks the
      column, or holds a document of more than 1 GiB.
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


def good_documents(span: Span, field: str, skip_bad_lines: bool) -> Iterator[Item]:
  """Yields the documents of a span, and its bad lines if they may be skipped.

  Raises:
    CalmError: at a bad line that may not be skipped, or if the file can't be read.
  """
  for item in documents(span, field):
    if isinstance(item, BadLine) and not skip_bad_lines:
      raise errors.CalmError(f"{item.where}: {item.reason}; --skip_bad_lines leaves it out")
    yield item


def _open(path: str) -> IO[bytes]:
  files.require_regular(path)  # Checked again: the file may have been replaced since.
  compression = COMPRESSIONS.get(pathlib.PurePath(path).suffix)
  if compression is None:
    return open(path, "rb")
  # Unlike the zstandard package, pyarrow reports a truncated stream. It is imported here
  # because the import is slow and most readers do not need it.
  import pyarrow as pa

  return io.BufferedReader(pa.input_stream(path, compression=compression), 2**20)  # pyright: ignore[reportArgumentType]


def _read_whole(span: Span, field: str) -> Iterator[Item]:
  """Yields the file as one document."""
  del field
  yield _content(span.path).decode("utf-8")


def _content(path: str) -> bytearray:
  """Returns the bytes of a file.

  Raises:
    ValueError: if there are more than a document may have.
  """
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
      # A line belongs to the span of its first byte, so skip the line that the start cuts.
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
      if len(line) > _LINE_BYTES:  # After the yield: a caller that stops here saves the read.
        position += _skip_line(file, None)


def _skip_line(file: IO[bytes], limit: int | None) -> int:
  """Reads and discards the rest of a line, at most `limit` bytes; returns the bytes read."""
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
    ValueError: with the reason, if the line holds no text that UTF-8 can encode.
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
  """Returns the number of newlines in the first `stop` bytes of a file."""
  count = 0
  with open(path, "rb") as file:
    while file.tell() < stop:
      count += file.read(min(2**20, stop - file.tell())).count(b"\n")
  return count


def _read_parquet(span: Span, field: str) -> Iterator[Item]:
  """Yields a column of text; a null is a bad line, located by its row."""
  import pyarrow as pa
  from pyarrow import parquet

  files.require_regular(span.path)
  try:
    with parquet.ParquetFile(span.path) as file:
      _require_text(span.path, file.schema_arrow, field)
    # Values are kept as dictionary indices, so a long value that a small file repeats a
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
  """Raises CalmError unless a Parquet schema has a column `field` of text."""
  import pyarrow as pa

  if field not in schema.names:
    raise errors.CalmError(
      f"{path} has no column {field!r} (--text_field names it) but {', '.join(schema.names)}"
    )
  kind = schema.field(field).type
  kind = kind.value_type if pa.types.is_dictionary(kind) else kind  # Stored as a dictionary.
  if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
    raise errors.CalmError(f"column {field!r} of {path} holds {kind}, not text")


def _value_of(where: str, value) -> Item:
  """Returns the text of a Parquet value, or a BadLine with the reason why it has none."""
  try:
    text = value.as_py()
  except UnicodeDecodeError as error:
    return BadLine(where, f"not UTF-8 ({error.reason} at byte {error.start})")
  if text is None:
    return BadLine(where, "null, not text")
  if len(text) > _LINE_BYTES:
    return BadLine(where, f"longer than {_LINE_BYTES:,} characters, the most a value may have")
  return text


def _read_topics(span: Span, field: str) -> Iterator[Item]:
  """Yields the text of `help()` on each topic of the language, by topic name."""
  del span, field
  topics = importlib.import_module("pydoc_data.topics").topics
  for name in sorted(topics):
    yield topics[name]


_ONE_DOCUMENT = (
  ".txt .md .rst .tex .html .py .pyi .c .h .cc .cpp .hpp .cu .java .js .ts .go .rs .rb .php .cs "
  ".swift .kt .scala .jl .r .lua .pl .sh .sql .hs .ml .clj .ex .zig"
)

# File suffix -> reader. A new format is a new row.
READERS = {
  ".jsonl": Reader(_read_json_lines, splittable=True),
  ".parquet": Reader(_read_parquet),
  **dict.fromkeys(_ONE_DOCUMENT.split(), Reader(_read_whole)),
  TOPICS: Reader(_read_topics),
}
