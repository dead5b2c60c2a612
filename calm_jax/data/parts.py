"""Documents -> parts: the tokens of a stretch of the corpus, made in parallel and kept.

A part is five files in a work folder: tokens and document lengths of each split, and a JSON
of counts, written last, with sums of the others and of itself. One that is whole is never made
again; one that was cut, zeroed or edited since is.
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
from calm_jax.data import holdout, manifest, sources, store
from calm_jax.data import tokenizer as tokenizer_lib

Counts = collections.Counter[str]  # "train.tokens", "heldout.documents", "0.bytes", ...
SKIPPED = "skipped_lines"

_LENGTH_DTYPE = np.dtype(np.int64)
_FILES = tuple(f"{split}.{name}" for split in manifest.SPLITS for name in ("tokens", "lengths"))
_READ_BYTES = 2**24
# SentencePiece needs some 50 bytes of memory a letter, so long documents are encoded
# in pieces that end at a newline.
_PIECE_LETTERS = 2**22


@dataclasses.dataclass(frozen=True)
class Job:
  """What every part of a run has in common.

  Attributes:
    directory: the work folder. tokenizer: its file. tokenizer_sha256: of its bytes.
    eos_id: its EOS.
    text_field: the field of JSON lines, the column of Parquet.
    skip_bad_lines: whether to count bad lines and go on.
    append_eos: whether EOS ends each document.
    division: what is held out.
  """

  directory: str
  tokenizer: str
  tokenizer_sha256: str
  eos_id: int
  text_field: str
  skip_bad_lines: bool
  append_eos: bool
  division: holdout.Division

  def digest(self, spans: Sequence[sources.Span]) -> str:
    """Returns a hash of all that the content of a part of these spans follows from."""
    values = dataclasses.asdict(self) | {"spans": [dataclasses.astuple(span) for span in spans]}
    return sealed_json.digest(
      {**values, "directory": "", "tokenizer": ""}
    )  # Not of where they lie.

  def file(self, part: int, name: str) -> epath.Path:
    """Returns the path of a part's file."""
    return epath.Path(self.directory) / f"{part:05d}.{name}"


@dataclasses.dataclass(frozen=True)
class Part:
  """A part that is made: what there was, and the SHA-256 of each of its files by name."""

  counts: Counts
  sums: dict[str, str]


def good_documents(
  span: sources.Span, field: str, skip_bad_lines: bool
) -> Iterator[str | sources.BadLine]:
  """Yields the documents of a span, and bad lines only where they may be skipped.

  Raises:
    CalmError: at a bad line that may not be skipped, or if the file can't be read.
  """
  for item in sources.documents(span, field):
    if isinstance(item, sources.BadLine) and not skip_bad_lines:
      raise errors.CalmError(f"{item.where}: {item.reason}; --skip_bad_lines leaves it out")
    yield item


def read_part(job: Job, part: int, spans: Sequence[sources.Span]) -> Part | None:
  """Returns a part that was made before, of the same, and is whole; else None."""
  path = job.file(part, "json")
  try:
    values = sealed_json.unsealed(files.read_json(path), str(path))
    if values["made_of"] != job.digest(spans):
      return None
    found = Part(collections.Counter(values["counts"]), values["files"])
    whole = all(files.digest(job.file(part, name)) == found.sums[name] for name in _FILES)
  except (errors.CalmError, KeyError):
    return None
  return found if whole else None


def make_part(job: Job, part: int, spans: Sequence[sources.Span]) -> Part:
  """Writes a part and returns what is in it, once it is on the disk.

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
  except OSError as error:  # Those of sources are CalmErrors by now.
    raise errors.CalmError(f"can't write {job.directory}: {error}") from error
  return Part(counts, sums)


def make_parts(
  job: Job,
  spans_of: dict[int, tuple[sources.Span, ...]],
  workers: int,
  on_done: Callable[[int, Part], None],
) -> None:
  """Makes parts in `workers` processes and calls `on_done` with each.

  Raises:
    CalmError: of the first part that fails, or if a process dies.
  """
  workers = min(workers, len(spans_of))
  if workers <= 1:
    for part, spans in spans_of.items():
      on_done(part, make_part(job, part, spans))
    return
  others = set(multiprocessing.active_children())
  executor = concurrent.futures.ProcessPoolExecutor(
    workers, multiprocessing.get_context("spawn"), _start_worker
  )
  try:
    futures = {
      executor.submit(make_part, job, part, spans): part for part, spans in spans_of.items()
    }
    for future in concurrent.futures.as_completed(futures):
      on_done(futures[future], future.result())
  except process.BrokenProcessPool as error:
    raise errors.CalmError(
      "a worker process died, perhaps for want of memory: run again with fewer --workers; "
      "finished parts are kept"
    ) from error
  finally:
    executor.shutdown(wait=False, cancel_futures=True)
    for child in set(multiprocessing.active_children()) - others:
      child.terminate()


def read_split(job: Job, parts: Sequence[Part], split: str, dtype: np.dtype) -> store.Content:
  """Returns a split of all parts, in order; reading it raises CalmError at a damaged file."""
  return store.Content(
    num_tokens=sum(part.counts[f"{split}.tokens"] for part in parts),
    num_documents=sum(part.counts[f"{split}.documents"] for part in parts),
    tokens=_read_blocks(job, parts, f"{split}.tokens", dtype),
    lengths=_read_blocks(job, parts, f"{split}.lengths", _LENGTH_DTYPE),
  )


def _start_worker() -> None:
  """Leaves Ctrl-C to the parent, and ends this process when the parent is gone."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent

  def follow() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, eos_id: int, sha256: str) -> tokenizer_lib.Tokenizer:
  loaded = tokenizer_lib.load(path, eos=eos_id)
  if loaded.sha256 != sha256:
    raise errors.CalmError(f"{path} changed while it was used: run prepare again")
  return loaded


class _SplitWriter:
  """Appends documents to a part's files of one split."""

  def __init__(self, split: str, opened: dict[str, IO[bytes]], dtype: np.dtype):
    self._split, self._files, self._dtype = split, opened, dtype
    self._sums = {name: hashlib.sha256() for name in opened}

  @classmethod
  @contextlib.contextmanager
  def open(cls, job: Job, part: int, split: str) -> Iterator["_SplitWriter"]:
    """Opens the files, in place of those of an attempt that was cut short."""
    tokenizer = _tokenizer(job.tokenizer, job.eos_id, job.tokenizer_sha256)
    for name in ("tokens", "lengths"):
      job.file(part, f"{split}.{name}").unlink(missing_ok=True)
    with (
      job.file(part, f"{split}.tokens").open("wb") as tokens,
      job.file(part, f"{split}.lengths").open("wb") as lengths,
    ):
      opened = {"tokens": tokens, "lengths": lengths}
      yield cls(split, opened, store.token_dtype(tokenizer.vocab_size))

  def append(self, pieces: Iterable[Sequence[int]]) -> int:
    """Writes one document, given in pieces, and returns its length in tokens."""
    length = 0
    for ids in pieces:
      self._write("tokens", np.array(ids, self._dtype))
      length += len(ids)
    self._write("lengths", np.array([length], _LENGTH_DTYPE))
    return length

  def sums(self) -> dict[str, str]:
    """Returns the SHA-256 of what was written, by file."""
    return {f"{self._split}.{name}": total.hexdigest() for name, total in self._sums.items()}

  def _write(self, name: str, values: np.ndarray) -> None:
    content = values.tobytes()
    self._sums[name].update(content)
    self._files[name].write(content)


def _tokenize(
  job: Job, part: int, spans: Iterable[sources.Span], writers: dict[str, _SplitWriter]
) -> Counts:
  """Writes the documents of `spans` to their splits and returns what there was."""
  tokenizer = _tokenizer(job.tokenizer, job.eos_id, job.tokenizer_sha256)
  end = [[tokenizer.eos_id]] if job.append_eos else []
  counts: Counts = collections.Counter()
  number = 0
  for span in spans:
    for item in good_documents(span, job.text_field, job.skip_bad_lines):
      if isinstance(item, sources.BadLine):
        counts[SKIPPED] += 1
        continue
      for split, text in job.division.of(part, number, item):
        encoded = (tokenizer.encode(piece) for piece in _pieces(text))
        counts[f"{split}.tokens"] += writers[split].append(itertools.chain(encoded, end))
        counts[f"{split}.documents"] += 1
      number += 1
      counts[f"{span.source}.bytes"] += len(item.encode())
      counts[f"{span.source}.documents"] += 1
  return counts


def _pieces(text: str) -> Iterator[str]:
  start = 0
  while len(text) - start > _PIECE_LETTERS:
    limit = start + _PIECE_LETTERS
    stop = text.rfind("\n", start, limit) + 1 or limit
    yield text[start:stop]
    start = stop
  yield text[start:]


def _read_blocks(
  job: Job, parts: Sequence[Part], name: str, dtype: np.dtype
) -> Iterator[np.ndarray]:
  """Yields a file of each part, and raises where one is not as it was written."""
  for number, part in enumerate(parts):
    path, found = job.file(number, name), hashlib.sha256()
    with path.open("rb") as file:
      while block := file.read(_READ_BYTES):
        found.update(block)
        yield np.frombuffer(block[: len(block) - len(block) % dtype.itemsize], dtype)
    if found.hexdigest() != part.sums[name]:
      raise errors.CalmError(
        f"{path} changed since it was written: run prepare again, which makes it anew"
      )
