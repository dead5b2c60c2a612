"""What is in a token store: a JSON file that is written last and carries a hash of itself."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from etils import epath

from calm_jax import errors, files, sealed_json

FORMAT_VERSION = 2
SPLITS = ("train", "heldout")
MANIFEST = "manifest.json"
AGAIN = "prepare the text again, into another --output"  # What to do with a damaged store.


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
  """The tokenizer of a store.

  Attributes:
    file: the name of its copy in the store. sha256: of its bytes.
    vocab_size: every id is smaller. eos_id: ends a document.
  """

  file: str
  sha256: str
  vocab_size: int
  eos_id: int

  @property
  def hash(self) -> str:
    """The first 16 hex digits of `sha256`, which workdirs record."""
    return self.sha256[:16]


@dataclasses.dataclass(frozen=True)
class Source:
  """An input: its name, and the UTF-8 bytes of its documents."""

  name: str
  bytes: int
  documents: int


@dataclasses.dataclass(frozen=True)
class Split:
  """The size of a split, and the SHA-256 of the elements of each shard, little-endian.

  They are of the elements, not of the files: the same tokens have the same sums
  whatever compressed them.
  """

  tokens: int
  documents: int
  token_shards: tuple[str, ...]
  offset_shards: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What is in a store.

  Attributes:
    appends_eos: whether EOS ends every document. dtype: of the stored tokens.
    heldout: the share asked for; `splits` has what came of it.
    heldout_by: how it was held out, see `data.holdout`.
    skipped_lines: bad lines left out of `sources`.
    plan: the SHA-256 of the file that says what the store was made from; empty for none.
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
    """Returns the text of the file, with its hash."""
    return files.to_json(sealed_json.sealed(dataclasses.asdict(self)))

  @classmethod
  def from_mapping(cls, values: Mapping[str, Any], where: str) -> "Manifest":
    """Returns the manifest that a file's JSON holds; `where` names the file.

    Raises:
      CalmError: if it is of another version, or not as it was written.
    """
    version = values.get("format_version")
    if version != FORMAT_VERSION:
      raise errors.CalmError(
        f"can't read {where}: format {version!r}, this version reads {FORMAT_VERSION}"
      )
    values = sealed_json.unsealed(values, where)
    try:
      manifest = _typed(cls, values)
      manifest._require_sound()
      return manifest
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise errors.CalmError(f"can't read {where}: {error!r}") from error

  def _require_sound(self) -> None:
    """Raises ValueError for what no writer of ours writes."""
    tokenizer, sizes = self.tokenizer, [(s.tokens, s.documents) for s in self.splits.values()]
    if tokenizer.file not in ("tokenizer.model", "tokenizer.json"):
      raise ValueError(f"the tokenizer's file is {tokenizer.file!r}")
    if not 0 <= tokenizer.eos_id < tokenizer.vocab_size < 2**31:
      raise ValueError(f"EOS {tokenizer.eos_id} of a vocabulary of {tokenizer.vocab_size}")
    if self.dtype not in ("uint16", "uint32") or min(map(min, sizes)) < 0:
      raise ValueError(f"type {self.dtype!r}, tokens and documents {sizes}")

  @property
  def content_hash(self) -> str:
    """16 hex digits that follow from what is read in training, and from nothing else.

    From tokens, offsets, tokenizer and EOS: not from names, times or compression.
    """
    values = dataclasses.asdict(self)
    read = {name: values[name] for name in ("appends_eos", "dtype", "splits")}
    tokenizer = self.tokenizer
    read["tokenizer"] = [tokenizer.sha256, tokenizer.vocab_size, tokenizer.eos_id]
    return sealed_json.digest(read)[:16]


def read(path: str) -> Manifest | None:
  """Returns the manifest of the store at `path`, None if there is no whole store.

  Raises:
    CalmError: if it can't be read, or is not as it was written.
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
    raise errors.CalmError(f"{error}: {AGAIN}") from error


def _typed(kind: Any, value: Any) -> Any:
  """Returns a value of JSON as the type it is to have: dataclass, tuple, mapping or plain."""
  if dataclasses.is_dataclass(kind):
    hints = typing.get_type_hints(kind)
    if value.keys() - hints.keys():
      raise ValueError(f"unknown fields {sorted(value.keys() - hints.keys())}")
    make: Any = kind
    return make(**{name: _typed(hints[name], value[name]) for name in hints})
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple and isinstance(value, list):
    return tuple(_typed(inner[0], item) for item in value)
  if origin is Mapping:  # Of splits.
    return {name: _typed(inner[1], value[name]) for name in SPLITS}
  if type(value) is not kind and not (kind is float and type(value) is int):
    raise ValueError(f"{value!r:.40} where {getattr(kind, '__name__', kind)} belongs")
  return value
