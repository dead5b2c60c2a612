"""Tokens -> token store: two flat arrays a split, readable at random, from disk or a bucket.

  manifest.json          what is in the store; written last, so it marks a whole store
  plan.json              what it was made from, for `calm_jax.prepare`
  tokenizer.model|json   a copy
  train/tokens           zarr v3, uint16 or uint32 [tokens]
  train/offsets          zarr v3, int64 [documents + 1]: the start of each document, and the end
  heldout/tokens, heldout/offsets

A block of 512 or of 8192 tokens takes one request, whatever its start.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from calm_jax import errors, files
from calm_jax.data import tokenizer as tokenizer_lib

FORMAT_VERSION = 1
SPLITS = ("train", "heldout")
MANIFEST = "manifest.json"

_CHUNK = 8192  # Elements that are compressed and read together.
_SHARD = 2**24  # Elements a file.


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
  """The tokenizer of a store: the name of its copy there, its hash and its EOS."""

  file: str
  hash: str
  vocab_size: int
  eos_id: int


@dataclasses.dataclass(frozen=True)
class Source:
  """An input: its name, and the UTF-8 bytes of its documents."""

  name: str
  bytes: int
  documents: int


@dataclasses.dataclass(frozen=True)
class Split:
  """The size of a split, and a checksum of its tokens and offsets."""

  tokens: int
  documents: int
  checksum: str


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What is in a store.

  Attributes:
    appends_eos: whether EOS ends every document. dtype: of the stored tokens.
    skipped_lines: bad lines left out of `sources`.
    heldout: the share of documents asked for; `splits` has what came of it.
  """

  tokenizer: TokenizerInfo
  appends_eos: bool
  dtype: str
  heldout: float
  skipped_lines: int
  sources: tuple[Source, ...]
  splits: Mapping[str, Split]
  format_version: int = FORMAT_VERSION

  @classmethod
  def from_json(cls, text: str) -> "Manifest":
    """Returns the manifest that `text` holds; ValueError, KeyError or TypeError for none."""
    values = json.loads(text)
    if values["format_version"] != FORMAT_VERSION:
      raise ValueError(f"format {values['format_version']}, this version reads {FORMAT_VERSION}")
    return cls(
      **values
      | {
        "tokenizer": TokenizerInfo(**values["tokenizer"]),
        "sources": tuple(Source(**source) for source in values["sources"]),
        "splits": {name: Split(**values["splits"][name]) for name in SPLITS},
      }
    )


@dataclasses.dataclass(frozen=True)
class Content:
  """A split to be written: its size, its tokens and its documents' lengths, in blocks."""

  num_tokens: int
  num_documents: int
  tokens: Iterable[np.ndarray]
  lengths: Iterable[np.ndarray]


class TokenStore:
  """A whole token store. Can be pickled, and read from several threads."""

  def __init__(self, path: str, manifest: Manifest):
    self.path, self.manifest = path, manifest
    self._tokens = {name: _open(path, f"{name}/tokens") for name in SPLITS}
    self._offsets = {name: _open(path, f"{name}/offsets") for name in SPLITS}
    for name, split in manifest.splits.items():
      found = self._tokens[name].shape[0], self._offsets[name].shape[0] - 1
      if found != (split.tokens, split.documents):
        raise errors.CalmError(
          f"{path} is damaged: {name} holds {found} tokens and documents, {MANIFEST} says "
          f"{(split.tokens, split.documents)}"
        )

  @classmethod
  def open(cls, path: str) -> "TokenStore":
    """Returns the store at `path`, a folder or a bucket's URL.

    Raises:
      CalmError: if there is none, or it is unfinished or damaged.
    """
    manifest = read_manifest(path)
    if manifest is None:
      if epath.Path(path).exists():
        raise errors.CalmError(f"the token store {path} is unfinished: run prepare again")
      raise errors.CalmError(f"no such token store: {path}")
    return cls(path, manifest)

  def __reduce__(self):
    return TokenStore, (self.path, self.manifest)

  @property
  def hash(self) -> str:
    """The first 16 hex digits of the manifest's SHA-256, which identify the content."""
    values = dataclasses.asdict(self.manifest)
    return _digest(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())

  def num_tokens(self, split: str) -> int:
    """Returns the number of tokens in a split."""
    return self.manifest.splits[split].tokens

  def read(self, split: str, start: int, stop: int) -> np.ndarray:
    """Returns tokens [start, stop) of a split, int32.

    Raises:
      ValueError: if the split does not hold them; CalmError if they are lost or damaged.
    """
    if not 0 <= start <= stop <= self.num_tokens(split):
      raise ValueError(f"{split} has tokens [0, {self.num_tokens(split)}), not [{start}, {stop})")
    return self._get(self._tokens[split][start:stop]).astype(np.int32)

  def offsets(self, split: str) -> np.ndarray:
    """Returns the start of each document and the end of the last, int64 [documents + 1]."""
    return self._get(self._offsets[split])

  def _get(self, array: Any) -> np.ndarray:
    try:
      return array.read().result()
    except ValueError as error:
      raise errors.CalmError(f"can't read the token store {self.path}: {error}") from error


def read_manifest(path: str) -> Manifest | None:
  """Returns the manifest of the store at `path`, None if there is no whole store.

  Raises:
    CalmError: if it can't be read.
  """
  file = epath.Path(path) / MANIFEST
  try:
    return Manifest.from_json(file.read_text())
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.CalmError(f"can't read {file}: {error}") from error


def token_dtype(vocab_size: int) -> np.dtype:
  """Returns the smallest type that tokens are stored in."""
  return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write(
  path: str,
  tokenizer: tokenizer_lib.Tokenizer,
  contents: Mapping[str, Content],
  sources: Iterable[Source],
  *,
  appends_eos: bool,
  heldout: float,
  skipped_lines: int,
) -> TokenStore:
  """Writes a store, its manifest last, and returns it.

  Raises:
    CalmError: if it can't be written.
  """
  dtype = token_dtype(tokenizer.vocab_size)
  root = epath.Path(path)
  file = f"tokenizer{epath.Path(tokenizer.path).suffix}"
  try:
    root.mkdir(parents=True, exist_ok=True)
    epath.Path(tokenizer.path).copy(root / file, overwrite=True)
    manifest = Manifest(
      tokenizer=TokenizerInfo(file, tokenizer.hash, tokenizer.vocab_size, tokenizer.eos_id),
      appends_eos=appends_eos,
      dtype=dtype.name,
      heldout=heldout,
      skipped_lines=skipped_lines,
      sources=tuple(sources),
      splits={name: _write_split(path, name, contents[name], dtype) for name in SPLITS},
    )
    files.write(root / MANIFEST, files.to_json(dataclasses.asdict(manifest)))
  except errors.CalmError:
    raise
  except (OSError, ValueError) as error:  # TensorStore tells a full disk by ValueError.
    reason = " ".join(str(error).split())
    raise errors.CalmError(f"can't write the token store {path}: {reason}") from error
  return TokenStore(path, manifest)


def _write_split(path: str, name: str, content: Content, dtype: np.dtype) -> Split:
  tokens = _write_array(path, f"{name}/tokens", content.num_tokens, dtype, content.tokens)
  offsets = _write_array(
    path, f"{name}/offsets", content.num_documents + 1, np.dtype(np.int64), _starts(content.lengths)
  )
  return Split(content.num_tokens, content.num_documents, _digest((tokens + offsets).encode()))


def _starts(lengths: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """Yields the start of each document, then the end of the last."""
  end = np.zeros(1, np.int64)
  yield end
  for block in lengths:
    starts = end + np.cumsum(block, dtype=np.int64)
    yield starts
    end = starts[-1:] if len(starts) else end


def _write_array(
  path: str, name: str, size: int, dtype: np.dtype, blocks: Iterable[np.ndarray]
) -> str:
  """Writes a flat array of `size` elements and returns the digest of its bytes."""
  array = tensorstore.open(_spec(path, name, size, dtype), create=True, delete_existing=True)
  array = array.result()
  digest, start = hashlib.sha256(), 0
  for block in _regrouped(blocks, _SHARD):
    stored = block.astype(dtype.newbyteorder("<"), copy=False)
    digest.update(stored.tobytes())
    array[start : start + len(stored)].write(stored).result()
    start += len(stored)
  assert start == size, (name, start, size)
  return digest.hexdigest()


def _regrouped(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
  """Yields the same elements in blocks of `size`, the last one shorter."""
  held, count = [], 0
  for block in blocks:
    held.append(block)
    count += len(block)
    if count >= size:
      whole = np.concatenate(held)
      yield from (whole[i : i + size] for i in range(0, count - size + 1, size))
      held, count = [whole[count - count % size :]], count % size
  if count:
    yield np.concatenate(held)


def _open(path: str, name: str) -> Any:
  try:
    return tensorstore.open(_address(path, name), read=True).result()
  except ValueError as error:
    reason = str(error).partition(" [tensorstore_spec=")[0]
    raise errors.CalmError(f"can't read the token store {path}: {reason}") from error


def _address(path: str, name: str) -> dict[str, Any]:
  url = f"{files.absolute(path).rstrip('/')}/{name}/"
  return {
    "driver": "zarr3",
    "kvstore": url if "://" in path else {"driver": "file", "path": url},
    # A lost file is an error, not a run of zeros.
    "fill_missing_data_reads": False,
    "store_data_equal_to_fill_value": True,
  }


def _spec(path: str, name: str, size: int, dtype: np.dtype) -> dict[str, Any]:
  inner = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 1}},
    {"name": "crc32c"},
  ]
  sharded = {"chunk_shape": [_CHUNK], "codecs": inner}
  grid = {"name": "regular", "configuration": {"chunk_shape": [_SHARD]}}
  return _address(path, name) | {
    "metadata": {
      "shape": [size],
      "data_type": dtype.name,
      "chunk_grid": grid,
      "codecs": [{"name": "sharding_indexed", "configuration": sharded}],
    }
  }


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:16]
