"""Documents -> parts: the tokens of a stretch of the corpus, made in parallel and kept.

A part is five files in a work folder: tokens and document lengths of each split,
and a JSON of counts, written last. One that has its counts is never made again.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import process

import numpy as np
from etils import epath

from calm_jax import errors, files
from calm_jax.data import sources, store
from calm_jax.data import tokenizer as tokenizer_lib

Counts = collections.Counter[str]  # "train.tokens", "heldout.documents", "0.bytes", ...
SKIPPED = "skipped_lines"

_LENGTH_DTYPE = np.dtype(np.int64)
_READ_BYTES = 2**24
# SentencePiece needs some 50 bytes of memory a letter, so long documents are encoded
# in pieces that end at a newline.
_PIECE_LETTERS = 2**22


@dataclasses.dataclass(frozen=True)
class Job:
  """What every part of a run has in common.

  Attributes:
    directory: the work folder. tokenizer: its file. eos_id: its EOS.
    text_field: the field of JSON lines, the column of Parquet.
    skip_bad_lines: whether to count bad lines and go on.
    append_eos: whether EOS ends each document.
    heldout: the share of documents that are held out.
  """

  directory: str
  tokenizer: str
  eos_id: int
  text_field: str
  skip_bad_lines: bool
  append_eos: bool
  heldout: float

  def file(self, part: int, name: str) -> epath.Path:
    """Returns the path of a part's file."""
    return epath.Path(self.directory) / f"{part:05d}.{name}"


def is_heldout(text: str, share: float) -> bool:
  """Tells whether a document is held out, by its content, so that its copies are too."""
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "big") < share * 2**64


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


def read_counts(job: Job, part: int) -> Counts | None:
  """Returns the counts of a part that was made before, else None."""
  try:
    return collections.Counter(json.loads(job.file(part, "json").read_text()))
  except (FileNotFoundError, ValueError):
    return None


def make_part(job: Job, part: int, spans: Sequence[sources.Span]) -> Counts:
  """Writes a part and returns its counts.

  Raises:
    CalmError: if its sources can't be read or its files can't be written.
  """
  try:
    with contextlib.ExitStack() as stack:
      writers = {
        split: stack.enter_context(_SplitWriter.open(job, part, split)) for split in store.SPLITS
      }
      counts = _tokenize(job, spans, writers)
    files.write(job.file(part, "json"), json.dumps(counts))
  except OSError as error:  # Those of sources are CalmErrors by now.
    raise errors.CalmError(f"can't write {job.directory}: {error}") from error
  return counts


def make_parts(
  job: Job,
  spans_of: dict[int, tuple[sources.Span, ...]],
  workers: int,
  on_done: Callable[[int, Counts], None],
) -> None:
  """Makes parts in `workers` processes and calls `on_done` with the counts of each.

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


def read_split(job: Job, counts: Sequence[Counts], split: str, dtype: np.dtype) -> store.Content:
  """Returns a split of all parts, in order."""
  parts = range(len(counts))
  return store.Content(
    num_tokens=sum(count[f"{split}.tokens"] for count in counts),
    num_documents=sum(count[f"{split}.documents"] for count in counts),
    tokens=_read_blocks((job.file(part, f"{split}.tokens") for part in parts), dtype),
    lengths=_read_blocks((job.file(part, f"{split}.lengths") for part in parts), _LENGTH_DTYPE),
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
def _tokenizer(path: str, eos_id: int) -> tokenizer_lib.Tokenizer:
  return tokenizer_lib.load(path, eos=eos_id)


class _SplitWriter:
  """Appends documents to a part's files of one split."""

  def __init__(self, tokens, lengths, dtype: np.dtype):
    self._tokens, self._lengths, self._dtype = tokens, lengths, dtype

  @classmethod
  @contextlib.contextmanager
  def open(cls, job: Job, part: int, split: str) -> Iterator["_SplitWriter"]:
    """Opens the files, emptying those of an attempt that was cut short."""
    dtype = store.token_dtype(_tokenizer(job.tokenizer, job.eos_id).vocab_size)
    with (
      job.file(part, f"{split}.tokens").open("wb") as tokens,
      job.file(part, f"{split}.lengths").open("wb") as lengths,
    ):
      yield cls(tokens, lengths, dtype)

  def append(self, ids: Sequence[int]) -> None:
    """Writes one document."""
    self._tokens.write(np.array(ids, self._dtype).tobytes())
    self._lengths.write(np.array([len(ids)], _LENGTH_DTYPE).tobytes())


def _tokenize(job: Job, spans: Iterable[sources.Span], writers: dict[str, _SplitWriter]) -> Counts:
  """Writes the documents of `spans` to their splits and returns what there was."""
  tokenizer = _tokenizer(job.tokenizer, job.eos_id)
  end = [tokenizer.eos_id] if job.append_eos else []
  counts: Counts = collections.Counter()
  for span in spans:
    for item in good_documents(span, job.text_field, job.skip_bad_lines):
      if isinstance(item, sources.BadLine):
        counts[SKIPPED] += 1
        continue
      ids = [token for piece in _pieces(item) for token in tokenizer.encode(piece)] + end
      split = "heldout" if is_heldout(item, job.heldout) else "train"
      writers[split].append(ids)
      counts[f"{split}.tokens"] += len(ids)
      counts[f"{split}.documents"] += 1
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


def _read_blocks(files: Iterable[epath.Path], dtype: np.dtype) -> Iterator[np.ndarray]:
  for path in files:
    with path.open("rb") as file:
      while block := file.read(_READ_BYTES):
        yield np.frombuffer(block, dtype)
