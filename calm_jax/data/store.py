"""Tokens -> token store: two flat arrays per split with random access, on disk or in a bucket.

  manifest.json          the content of the store, with sums of all of it and a hash of itself;
                         written last, so it marks a complete store
  plan.json              what the store was made from, for `calm_jax.prepare`
  tokenizer.model|json   a copy of the tokenizer
  train/tokens           zarr v3, uint16 or uint32 [tokens]
  train/offsets          zarr v3, int64 [documents + 1]: the start of each document, and the end
  heldout/tokens, heldout/offsets

A block of 512 or of 8192 tokens takes one request, whatever its start. Opening checks the
manifest's hash and the size of the arrays. Reading checks the CRC-32C of the chunks it reads, and
the sums of offsets. `TokenStore.checks` covers the complete store.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from etils import epath

from calm_jax import errors, files
from calm_jax.data import arrays
from calm_jax.data import manifest as manifest_lib
from calm_jax.data import tokenizer as tokenizer_lib
from calm_jax.data.manifest import MANIFEST, SPLITS

PLAN = "plan.json"
OFFSET_DTYPE = np.dtype(np.int64)


class TokenStore:
  """A complete token store. It can be pickled, and read from several threads."""

  def __init__(self, path: str, manifest: manifest_lib.Manifest):
    self.path, self.manifest = path, manifest
    self._tokens, self._offsets = {}, {}
    for name, split in manifest.splits.items():
      ends = split.documents + 1
      self._tokens[name] = arrays.open(
        path, f"{name}/tokens", split.tokens, np.dtype(manifest.dtype), len(split.token_shards)
      )
      self._offsets[name] = arrays.open(
        path, f"{name}/offsets", ends, OFFSET_DTYPE, len(split.offset_shards)
      )

  @classmethod
  def open(cls, path: str) -> "TokenStore":
    """Returns the store at `path`, a folder or a bucket's URL.

    Raises:
      CalmError: if there is none, or it is unfinished or visibly damaged.
    """
    manifest = manifest_lib.read(path)
    if manifest is None:
      if epath.Path(path).exists():
        raise errors.CalmError(f"the token store {path} is unfinished: run prepare again")
      raise errors.CalmError(f"no such token store: {path}")
    return cls(path, manifest)

  def __reduce__(self):
    return TokenStore, (self.path, self.manifest)

  @property
  def hash(self) -> str:
    """16 hex digits that identify the tokens, offsets, tokenizer and EOS."""
    return self.manifest.content_hash

  def num_tokens(self, split: str) -> int:
    """Returns the number of tokens in a split."""
    return self.manifest.splits[split].tokens

  def read(self, split: str, start: int, stop: int) -> np.ndarray:
    """Returns tokens [start, stop) of a split, int32.

    Raises:
      ValueError: if the range exceeds the split.
      CalmError: if the tokens are missing or damaged.
    """
    return self.read_rows(split, [start], stop - start)[0]

  def read_rows(self, split: str, starts: Sequence[int], length: int) -> np.ndarray:
    """Returns tokens [start, start + length) of each start, int32 [starts, length].

    The rows are read in parallel.

    Raises:
      ValueError: if a range exceeds the split.
      CalmError: if the tokens are missing or damaged.
    """
    size, tokens = self.num_tokens(split), self._tokens[split]
    for start in starts:
      if not 0 <= start <= start + length <= size:
        raise ValueError(f"{split} has tokens [0, {size}), not [{start}, {start + length})")
    pending = [tokens[start : start + length].read() for start in starts]
    rows = [arrays.result(row, self.path) for row in pending]
    return np.stack(rows, dtype=np.int32)

  def offsets(self, split: str) -> np.ndarray:
    """Returns the start of each document and the end of the last, int64 [documents + 1].

    Raises:
      CalmError: if the offsets are missing or damaged.
    """
    sums = self.manifest.splits[split].offset_shards
    blocks = arrays.verified(self._offsets[split], self.path, f"{split}/offsets", sums)
    return np.concatenate([np.zeros(0, OFFSET_DTYPE), *blocks])

  def checks(self) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yields (name, check) for each file and array of the store.

    A check reads all of it, in a few MiB of memory, and returns a line on the result. It
    raises CalmError with the name of the file if the content differs from what was written.
    """
    yield MANIFEST, self._check_manifest
    yield PLAN, self._check_plan
    yield self.manifest.tokenizer.file, self.require_tokenizer
    for split in SPLITS:
      yield f"{split}/tokens", functools.partial(self._check_tokens, split)
      yield f"{split}/offsets", functools.partial(self._check_offsets, split)

  def _check_manifest(self) -> str:
    """Returns a line on the manifest; raises CalmError if it was replaced since opening."""
    if manifest_lib.read(self.path) != self.manifest:
      raise errors.CalmError(f"{epath.Path(self.path) / MANIFEST} was replaced since it was opened")
    return f"SHA-256 of its fields; store {self.hash}"

  def _check_plan(self) -> str:
    """Returns a line on the plan; raises CalmError if it was changed since it was written."""
    if not self.manifest.plan:
      return "none: the store was not made by prepare"
    require_digest(epath.Path(self.path) / PLAN, self.manifest.plan)
    return "SHA-256 of its bytes"

  def require_tokenizer(self) -> str:
    """Returns a line on the tokenizer's copy.

    Raises:
      CalmError: if it is not the tokenizer that produced the tokens.
    """
    info = self.manifest.tokenizer
    path = epath.Path(self.path) / info.file
    require_digest(path, info.sha256)
    loaded = tokenizer_lib.load(str(path), info.eos_id)
    if loaded.vocab_size != info.vocab_size:
      raise errors.CalmError(
        f"{path} has a vocabulary of {loaded.vocab_size}, but {MANIFEST} says {info.vocab_size}"
      )
    return f"SHA-256 of its bytes; vocabulary of {info.vocab_size:,}, EOS {info.eos_id}"

  def _check_tokens(self, split: str) -> str:
    """Returns a line on the tokens of a split.

    Raises:
      CalmError: if they differ from those written, or exceed the vocabulary.
    """
    name, size = f"{split}/tokens", self.manifest.tokenizer.vocab_size
    sums = self.manifest.splits[split].token_shards
    for block in arrays.verified(self._tokens[split], self.path, name, sums):
      if len(block) and int(block.max()) >= size:
        raise errors.CalmError(
          f"{epath.Path(self.path) / name} is damaged: it holds token {int(block.max())}, but the "
          f"vocabulary has {size}"
        )
    return f"SHA-256 of {len(sums)} shards, {self.num_tokens(split):,} tokens of the vocabulary"

  def _check_offsets(self, split: str) -> str:
    """Returns a line on the document offsets of a split.

    Raises:
      CalmError: if they differ from those written, or do not ascend from 0 to the number of
        tokens.
    """
    name, sizes = f"{split}/offsets", self.manifest.splits[split]
    first, last = None, 0
    for block in arrays.verified(self._offsets[split], self.path, name, sizes.offset_shards):
      first = int(block[0]) if first is None else first
      if np.any(np.diff(block, prepend=last) < 0):
        raise errors.CalmError(f"{epath.Path(self.path) / name} is damaged: it does not ascend")
      last = int(block[-1])
    if (first, last) != (0, sizes.tokens):
      raise errors.CalmError(
        f"{epath.Path(self.path) / name} is damaged: it goes from {first} to {last}, but the split "
        f"has {sizes.tokens} tokens"
      )
    return f"SHA-256 of {len(sizes.offset_shards)} shards, {sizes.documents:,} documents"


def require_digest(path: epath.Path, expected: str) -> None:
  """Raises CalmError unless a file's bytes have the SHA-256 that a store's manifest records."""
  files.require_digest(path, expected, f"{MANIFEST} says", manifest_lib.ADVICE)
