"""The manifest of a token store: its content as JSON, written last, with a hash of itself."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from etils import epath

from calm_jax import errors, files, sealed_json

FORMAT_VERSION = 2
SPLITS = ("train", "heldout")
MANIFEST = "manifest.json"
ADVICE = "prepare the text again, into another --output"  # What to do about a damaged store.


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
  """The tokenizer of a store.

  Attributes:
    file: name of its copy in the store.
    sha256: SHA-256 of the copy's bytes.
    vocab_size: V; every id is smaller.
    eos_id: id of the token that ends a document.
  """

  file: str
  sha256: str
  vocab_size: int
  eos_id: int

  @property
  def hash(self) -> str:
    """The first 16 hex digits of `sha256`; workdirs record them."""
    return self.sha256[:16]


@dataclasses.dataclass(frozen=True)
class Source:
  """An input: its name, the UTF-8 bytes of its documents, and their number."""

  name: str
  bytes: int
  documents: int


@dataclasses.dataclass(frozen=True)
class Split:
  """Size of a split, and the SHA-256 of each shard's elements, little-endian.

  The sums cover the elements, not the files, so they do not depend on the compression.
  """

  tokens: int
  documents: int
  token_shards: tuple[str, ...]
  offset_shards: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The content of a store.

  Attributes:
    appends_eos: whether EOS ends every document.
    dtype: type of the stored tokens.
    heldout: the requested held-out share; `splits` has the resulting sizes.
    heldout_by: what was held out; see `data.holdout`.
    skipped_lines: number of bad lines left out.
    sources: the inputs.
    splits: split name -> its size and sums.
    plan: SHA-256 of the plan file, which states what the store was made from; empty if there
      is none.
  """

  tokenizer: TokenizerInfo
  appends_eos: bool
  dtype: str
  heldout: float
  heldout_by: str
  skipped_lines: int
  sources: tuple[Source, ...]
  splits: Mapping[str, Split]
  plan: str = ""
  format_version: int = FORMAT_VERSION

  def to_json(self) -> str:
    """Returns the JSON text of the manifest, with its hash."""
    return files.to_json(sealed_json.sealed(dataclasses.asdict(self)))

  @classmethod
  def from_mapping(cls, values: Mapping[str, Any], where: str) -> "Manifest":
    """Returns the manifest in a file's JSON.

    Args:
      values: the JSON object.
      where: names the file in errors.

    Raises:
      CalmError: if it has another format version or was changed since it was written.
    """
    version = values.get("format_version")
    if version != FORMAT_VERSION:
      raise errors.CalmError(
        f"can't read {where}: it has format {version!r}, this version reads {FORMAT_VERSION}"
      )
    values = sealed_json.unsealed(values, where)
    try:
      manifest = _typed(cls, values)
      manifest._require_valid()
      return manifest
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise errors.CalmError(f"can't read {where}: {error!r}") from error

  def _require_valid(self) -> None:
    """Raises ValueError for values that `prepare` never writes."""
    tokenizer, sizes = self.tokenizer, [(s.tokens, s.documents) for s in self.splits.values()]
    if tokenizer.file not in ("tokenizer.model", "tokenizer.json"):
      raise ValueError(f"the tokenizer's file is {tokenizer.file!r}")
    if not 0 <= tokenizer.eos_id < tokenizer.vocab_size < 2**31:
      raise ValueError(f"EOS {tokenizer.eos_id} of a vocabulary of {tokenizer.vocab_size}")
    if self.dtype not in ("uint16", "uint32") or min(map(min, sizes)) < 0:
      raise ValueError(f"type {self.dtype!r}, tokens and documents {sizes}")

  @property
  def content_hash(self) -> str:
    """16 hex digits that identify what training reads: tokens, offsets, tokenizer and EOS.

    Names, times and compression do not change them.
    """
    values = dataclasses.asdict(self)
    content = {name: values[name] for name in ("appends_eos", "dtype", "splits")}
    tokenizer = self.tokenizer
    content["tokenizer"] = [tokenizer.sha256, tokenizer.vocab_size, tokenizer.eos_id]
    return sealed_json.digest(content)[:16]


def read(path: str) -> Manifest | None:
  """Returns the manifest of the store at `path`, None if there is no complete store.

  Raises:
    CalmError: if it can't be read or was changed since it was written.
  """
  files.require_reachable(path)
  file = epath.Path(path) / MANIFEST
  try:
    text = files.read(file)
  except errors.CalmError as error:
    if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
      return None
    raise
  try:
    return Manifest.from_mapping(files.parse_json(text, str(file)), str(file))
  except errors.CalmError as error:
    raise errors.CalmError(f"{error}: {ADVICE}") from error


def _typed(kind: Any, value: Any) -> Any:
  """Returns a JSON value converted to `kind`: a dataclass, tuple, mapping or plain type."""
  if dataclasses.is_dataclass(kind):
    hints = typing.get_type_hints(kind)
    if value.keys() - hints.keys():
      raise ValueError(f"unknown fields {sorted(value.keys() - hints.keys())}")
    make: Any = kind
    return make(**{name: _typed(hints[name], value[name]) for name in hints})
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple and isinstance(value, list):
    return tuple(_typed(inner[0], item) for item in value)
  if origin is Mapping:  # Manifest.splits.
    return {name: _typed(inner[1], value[name]) for name in SPLITS}
  if type(value) is not kind and not (kind is float and type(value) is int):
    raise ValueError(f"{value!r:.40} is not of type {getattr(kind, '__name__', kind)}")
  return value
