"""Documents -> parts: tokens of consecutive stretches of a corpus, written in parallel.

A part is five files in a work folder: the tokens and document lengths of each split, and a JSON
file of counts, written last, with the sums of the other files and of itself. After a restart,
intact parts are reused; truncated, zeroed or edited parts are written again.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import process
from typing import IO

import numpy as np
from etils import epath

from calm_jax import errors, files, sealed_json
from calm_jax.data import holdout, manifest, readers, store_writer
from calm_jax.data import tokenizer as tokenizer_lib

Counts = collections.Counter[str]  # "train.tokens", "heldout.documents", "0.bytes", ...
SKIPPED = "skipped_lines"

_LENGTH_DTYPE = np.dtype(np.int64)
_FILES = tuple(f"{split}.{name}" for split in manifest.SPLITS for name in ("tokens", "lengths"))
_READ_BYTES = 2**24
# SentencePiece needs about 50 bytes of memory per character, so long documents are encoded in
# pieces of this many characters that end at a newline.
_PIECE_LENGTH = 2**22


@dataclasses.dataclass(frozen=True)
class PartJob:
  """The settings that all parts of a run share.

  Attributes:
    directory: path of the work folder.
    tokenizer: path of the tokenizer file.
    tokenizer_sha256: SHA-256 of its bytes.
    eos_id: id of its EOS.
    text_field: field of JSON lines, column of Parquet.
    skip_bad_lines: whether bad lines are counted and left out.
    append_eos: whether EOS ends each document.
    division: assigns documents to splits.
  """

  directory: str
  tokenizer: str
  tokenizer_sha256: str
  eos_id: int
  text_field: str
  skip_bad_lines: bool
  append_eos: bool
  division: holdout.Division

  def digest(self, spans: Sequence[readers.Span]) -> str:
    """Returns a hash of everything that determines the content of a part of `spans`."""
    values = dataclasses.asdict(self) | {"spans": [dataclasses.astuple(span) for span in spans]}
    values |= {"directory": "", "tokenizer": ""}  # Paths do not matter.
    return sealed_json.digest(values)

  def file(self, part: int, name: str) -> epath.Path:
    """Returns the path of a part's file."""
    return epath.Path(self.directory) / f"{part:05d}.{name}"


@dataclasses.dataclass(frozen=True)
class Part:
  """A finished part: counts of its content, and the SHA-256 of each of its files by name."""

  counts: Counts
  sums: dict[str, str]


def read_part(job: PartJob, part: int, spans: Sequence[readers.Span]) -> Part | None:
  """Returns the part of an earlier attempt if it is intact and of the same input, else None."""
  path = job.file(part, "json")
  try:
    values = sealed_json.unsealed(files.read_json(path), str(path))
    if values["made_of"] != job.digest(spans):
      return None
    loaded = Part(collections.Counter(values["counts"]), values["files"])
    is_intact = all(files.digest(job.file(part, name)) == loaded.sums[name] for name in _FILES)
  except (errors.CalmError, KeyError):
    return None
  return loaded if is_intact else None


def make_part(job: PartJob, part: int, spans: Sequence[readers.Span]) -> Part:
  """Writes a part, flushes it to disk and returns it.

  Raises:
    CalmError: if its sources can't be read or its files can't be written.
  """
  try:
    with contextlib.ExitStack() as stack:
      writers = {
        split: stack.enter_context(_SplitWriter.open(job, part, split)) for split in manifest.SPLITS
      }
      counts = _tokenize(job, part, spans, writers)
    sums = {name: total for writer in writers.values() for name, total in writer.sums().items()}
    for name in _FILES:
      files.sync(job.file(part, name))
    values = {"made_of": job.digest(spans), "counts": dict(counts), "files": sums}
    files.write(job.file(part, "json"), files.to_json(sealed_json.sealed(values)))
  except OSError as error:  # Reading errors are CalmErrors already.
    raise errors.CalmError(f"can't write {job.directory}: {error}") from error
  return Part(counts, sums)


def make_parts(
  job: PartJob,
  spans_by_part: dict[int, tuple[readers.Span, ...]],
  workers: int,
  on_done: Callable[[int, Part], None],
) -> None:
  """Makes parts in `workers` processes and calls `on_done` with each finished part.

  Raises:
    CalmError: the error of the first part that fails, or if a process dies.
  """
  workers = min(workers, len(spans_by_part))
  if workers <= 1:
    for part, spans in spans_by_part.items():
      on_done(part, make_part(job, part, spans))
    return
  earlier_children = set(multiprocessing.active_children())
  executor = concurrent.futures.ProcessPoolExecutor(
    workers, multiprocessing.get_context("spawn"), _start_worker
  )
  try:
    futures = {
      executor.submit(make_part, job, part, spans): part for part, spans in spans_by_part.items()
    }
    for future in concurrent.futures.as_completed(futures):
      on_done(futures[future], future.result())
  except process.BrokenProcessPool as error:
    raise errors.CalmError(
      "a worker process died, perhaps for lack of memory: run again with fewer --workers; "
      "finished parts are kept"
    ) from error
  finally:
    executor.shutdown(wait=False, cancel_futures=True)
    for child in set(multiprocessing.active_children()) - earlier_children:
      child.terminate()


def read_split(
  job: PartJob, parts: Sequence[Part], split: str, dtype: np.dtype
) -> store_writer.SplitContent:
  """Returns a split of all parts, in order; reading it raises CalmError at a damaged file."""
  return store_writer.SplitContent(
    num_tokens=sum(part.counts[f"{split}.tokens"] for part in parts),
    num_documents=sum(part.counts[f"{split}.documents"] for part in parts),
    tokens=_read_blocks(job, parts, f"{split}.tokens", dtype),
    lengths=_read_blocks(job, parts, f"{split}.lengths", _LENGTH_DTYPE),
  )


def _start_worker() -> None:
  """Ignores Ctrl-C, which the parent handles, and ends this process when the parent ends."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent

  def exit_with_parent() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=exit_with_parent, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, eos_id: int, sha256: str) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer in a file; raises CalmError if the file's bytes have changed."""
  loaded = tokenizer_lib.load(path, eos=eos_id)
  if loaded.sha256 != sha256:
    raise errors.CalmError(f"{path} changed while it was used: run prepare again")
  return loaded


class _SplitWriter:
  """Appends documents to the files of one split of a part."""

  def __init__(self, split: str, opened: dict[str, IO[bytes]], dtype: np.dtype):
    self._split, self._files, self._dtype = split, opened, dtype
    self._sums = {name: hashlib.sha256() for name in opened}

  @classmethod
  @contextlib.contextmanager
  def open(cls, job: PartJob, part: int, split: str) -> Iterator["_SplitWriter"]:
    """Opens the files, replacing those of an interrupted attempt."""
    tokenizer = _tokenizer(job.tokenizer, job.eos_id, job.tokenizer_sha256)
    for name in ("tokens", "lengths"):
      job.file(part, f"{split}.{name}").unlink(missing_ok=True)
    with (
      job.file(part, f"{split}.tokens").open("wb") as tokens,
      job.file(part, f"{split}.lengths").open("wb") as lengths,
    ):
      opened = {"tokens": tokens, "lengths": lengths}
      yield cls(split, opened, store_writer.token_dtype(tokenizer.vocab_size))

  def append(self, pieces: Iterable[Sequence[int]]) -> int:
    """Writes a document, given as pieces of ids, and returns its length in tokens."""
    length = 0
    for ids in pieces:
      self._write("tokens", np.array(ids, self._dtype))
      length += len(ids)
    self._write("lengths", np.array([length], _LENGTH_DTYPE))
    return length

  def sums(self) -> dict[str, str]:
    """Returns the SHA-256 of the bytes written so far, by file."""
    return {f"{self._split}.{name}": sha256.hexdigest() for name, sha256 in self._sums.items()}

  def _write(self, name: str, values: np.ndarray) -> None:
    content = values.tobytes()
    self._sums[name].update(content)
    self._files[name].write(content)


def _tokenize(
  job: PartJob, part: int, spans: Iterable[readers.Span], writers: dict[str, _SplitWriter]
) -> Counts:
  """Writes the documents of `spans` to their splits and returns their counts."""
  tokenizer = _tokenizer(job.tokenizer, job.eos_id, job.tokenizer_sha256)
  end = [[tokenizer.eos_id]] if job.append_eos else []
  counts: Counts = collections.Counter()
  number = 0
  for span in spans:
    for item in readers.good_documents(span, job.text_field, job.skip_bad_lines):
      if isinstance(item, readers.BadLine):
        counts[SKIPPED] += 1
        continue
      for split, text in job.division.split(part, number, item):
        encoded = (tokenizer.encode(piece) for piece in _pieces(text))
        counts[f"{split}.tokens"] += writers[split].append(itertools.chain(encoded, end))
        counts[f"{split}.documents"] += 1
      number += 1
      counts[f"{span.source}.bytes"] += len(item.encode())
      counts[f"{span.source}.documents"] += 1
  return counts


def _pieces(text: str) -> Iterator[str]:
  """Yields a text in pieces of at most `_PIECE_LENGTH` characters, ended at newlines if any."""
  start = 0
  while len(text) - start > _PIECE_LENGTH:
    limit = start + _PIECE_LENGTH
    stop = text.rfind("\n", start, limit) + 1 or limit
    yield text[start:stop]
    start = stop
  yield text[start:]


def _read_blocks(
  job: PartJob, parts: Sequence[Part], name: str, dtype: np.dtype
) -> Iterator[np.ndarray]:
  """Yields the file `name` of all parts in blocks; raises CalmError if one was changed."""
  for number, part in enumerate(parts):
    path, sha256 = job.file(number, name), hashlib.sha256()
    with path.open("rb") as file:
      while block := file.read(_READ_BYTES):
        sha256.update(block)
        yield np.frombuffer(block[: len(block) - len(block) % dtype.itemsize], dtype)
    if sha256.hexdigest() != part.sums[name]:
      raise errors.CalmError(
        f"{path} changed since it was written: run prepare again, which rewrites it"
      )
