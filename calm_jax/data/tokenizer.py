"""Documents -> tokens: SentencePiece models and Hugging Face's tokenizer.json."""

import abc
import collections
import hashlib
import io
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

import sentencepiece
import tokenizers
from etils import epath

from calm_jax import errors, files

# Names of the EOS token in well-known tokenizer.json files; the first that exists is used.
EOS_NAMES = (
  "<|end_of_text|>",
  "<|endoftext|>",
  "</s>",
  "<eos>",
  "<|eos|>",
  "[EOS]",
  "<｜end▁of▁sentence｜>",  # noqa: RUF001 -- DeepSeek uses these characters.
)

_MAX_BYTES = 2**28  # Limit of a tokenizer file; the largest in use have about 2**25.
_SPACE_MARK = "▁"  # SentencePiece encodes a space as this character and decodes it to a space.

# The spans of a learned piece: a word with the space and punctuation before it, punctuation
# with the newlines after it, or a run of newlines. SentencePiece gives each space of a run
# its own piece; CHANGELOG.md has the figures of pieces for runs.
_WORD = re.compile(r" ?[^\s\w]*\w+| ?[^\s\w]+(?:\r?\n)*| +|(?:\r?\n)+")


class Tokenizer(abc.ABC):
  """Converts text to ids and back.

  `encode` never returns EOS or another control id: text that looks like a special token is
  encoded character by character.

  Attributes:
    path: path of the tokenizer file.
    sha256: SHA-256 of its bytes.
    vocab_size: V; every id is smaller.
    eos_id: id of the token that ends a document.
  """

  path: str
  sha256: str
  vocab_size: int
  eos_id: int

  def __init__(self, path: str, content: bytes):
    self.path, self.sha256 = path, hashlib.sha256(content).hexdigest()

  @property
  def hash(self) -> str:
    """The first 16 hex digits of `sha256`."""
    return self.sha256[:16]

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, without EOS.

    Raises:
      CalmError: if the tokenizer can't encode the text, for example because it lacks an
        unknown token.
    """
    try:
      return self._encode(text)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
      raise
    except BaseException as error:  # See `_read`.
      raise errors.CalmError(
        f"tokenizer {self.path} can't encode a text: {_reason(error):.200}"
      ) from error

  @abc.abstractmethod
  def _encode(self, text: str) -> list[int]:
    """Implements `encode`; raises the library's own errors."""

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`; control ids decode to nothing."""

  @abc.abstractmethod
  def piece(self, token: int) -> str:
    """Returns the vocabulary's name of an id."""

  @abc.abstractmethod
  def find(self, names: Sequence[str]) -> int | None:
    """Returns the id of the first of `names` that is a control token, None if none is."""


class _SentencePiece(Tokenizer):
  """A SentencePiece model; decode(encode(x)) == x for models that `train` makes."""

  def __init__(self, path: str, content: bytes):
    super().__init__(path, content)
    self._model = sentencepiece.SentencePieceProcessor()
    self._model.LoadFromSerializedProto(content)
    self.vocab_size = self._model.vocab_size()
    self._mark_ids = self._bytes_of_mark()

  def _bytes_of_mark(self) -> list[int]:
    """Returns the byte pieces of a literal space mark, [] if the model can't use them."""
    ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
    adds_prefix = self._model.encode("a", out_type=str)[0].startswith(_SPACE_MARK)
    return ids if all(map(self._model.is_byte, ids)) and not adds_prefix else []

  def _encode(self, text: str) -> list[int]:
    if not self._mark_ids or _SPACE_MARK not in text:
      return self._model.encode(text)
    first, *rest = self._model.encode(text.split(_SPACE_MARK))
    return first + [token for ids in rest for token in self._mark_ids + ids]

  def decode(self, ids: Iterable[int]) -> str:
    # A model's table may be padded, so ids beyond the vocabulary are possible.
    return self._model.decode([int(token) for token in ids if token < self.vocab_size])

  def piece(self, token: int) -> str:
    return self._model.id_to_piece(token)

  def find(self, names: Sequence[str]) -> int | None:
    ids = (self._model.piece_to_id(name) for name in names)
    return next((token for token in ids if self._model.is_control(token)), None)


class _HuggingFace(Tokenizer):
  """A tokenizer.json of the `tokenizers` package; template, padding and truncation are off."""

  def __init__(self, path: str, content: bytes):
    super().__init__(path, content)
    self._model = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    self._model.no_padding()
    self._model.no_truncation()
    self._model.encode_special_tokens = True  # Special tokens in a text are plain characters.
    # Ids may have gaps, so the number of pieces is not a bound.
    self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values(), default=-1)
    added = [token["content"] for token in json.loads(content)["added_tokens"]]
    # The model's ids, which may differ from those in the file.
    self._added = {name: self._model.token_to_id(name) for name in added}

  def _encode(self, text: str) -> list[int]:
    return self._model.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int]) -> str:
    return self._model.decode([int(token) for token in ids], skip_special_tokens=True)

  def piece(self, token: int) -> str:
    return self._model.id_to_token(token) or ""

  def find(self, names: Sequence[str]) -> int | None:
    return next((self._added[name] for name in names if name in self._added), None)


# File suffix -> tokenizer class. A new kind of file is a new row.
KINDS = {".model": _SentencePiece, ".json": _HuggingFace}


def load(path: str, eos: str | int = "") -> Tokenizer:
  """Returns the tokenizer in a file.

  Args:
    path: a SentencePiece .model or a Hugging Face tokenizer.json.
    eos: name or id of the token that ends a document; empty to look it up by EOS_NAMES.

  Raises:
    CalmError: if there is no such file, it can't be read, or its EOS is missing or can't be
      used.
  """
  kind = KINDS.get(pathlib.PurePath(path).suffix)
  if kind is None:
    raise errors.CalmError(
      f"{path!r} is not a tokenizer: give a SentencePiece .model, a Hugging Face tokenizer.json "
      "or train:VOCAB"
    )
  tokenizer = _read(kind, path)
  tokenizer.eos_id = eos if isinstance(eos, int) else _eos_id(tokenizer, eos)
  if not 0 <= tokenizer.eos_id < tokenizer.vocab_size:
    raise errors.CalmError(
      f"{path} has no token {tokenizer.eos_id} to end documents with: its vocabulary has "
      f"{tokenizer.vocab_size}"
    )
  if tokenizer.eos_id in tokenizer.encode(tokenizer.piece(tokenizer.eos_id)):
    raise errors.CalmError(
      f"{path} encodes the text {tokenizer.piece(tokenizer.eos_id)!r} as EOS, so documents "
      "that mention it would end there: make it a control or special token"
    )
  return tokenizer


def _read(kind: type[Tokenizer], path: str) -> Tokenizer:
  """Returns the tokenizer in a file, without its `eos_id`."""
  file = epath.Path(path)
  files.require_regular(path)
  try:
    size = file.stat().length
    if size > _MAX_BYTES:
      raise errors.CalmError(
        f"can't read tokenizer {path}: it has {size:,} bytes, the limit is {_MAX_BYTES:,}"
      )
    tokenizer = kind(path, file.read_bytes())
  except errors.CalmError:
    raise
  except FileNotFoundError as error:
    raise errors.CalmError(f"no such tokenizer: {path}") from error
  except (KeyboardInterrupt, SystemExit, GeneratorExit):
    raise
  except BaseException as error:  # `tokenizers` raises no narrower class, and Rust may panic.
    raise errors.CalmError(f"can't read tokenizer {path}: {_reason(error)}") from error
  if not 0 < tokenizer.vocab_size < 2**31:
    raise errors.CalmError(
      f"can't read tokenizer {path}: its ids go up to {tokenizer.vocab_size - 1:,}, they must "
      f"lie in [0, {2**31 - 1:,})"
    )
  return tokenizer


def _reason(error: BaseException) -> str:
  """Returns an error's message in one line, its class if it has none."""
  return " ".join(str(error).split()) or type(error).__name__


def _eos_id(tokenizer: Tokenizer, name: str) -> int:
  """Returns the id of the token `name`, or of a well-known EOS if `name` is empty."""
  eos_id = tokenizer.find((name,) if name else EOS_NAMES)
  if eos_id is None:
    missing = repr(name) if name else f"none of {', '.join(EOS_NAMES)}"
    raise errors.CalmError(
      f"{tokenizer.path} has no token that ends a document ({missing}): name it with --eos_token"
    )
  return eos_id


def train(texts: Iterable[str], vocab_size: int, output_path: str) -> Tokenizer:
  """Trains a lossless byte-fallback BPE of `vocab_size` pieces, writes it and returns it.

  Two pieces are <unk>, which never occurs, and </s>, the EOS; 256 are bytes. Training is
  deterministic: the same texts give the same file.

  Raises:
    CalmError: if the vocabulary is too large or too small for the texts.
  """
  counts = collections.Counter(word for text in texts for word in _WORD.findall(text))
  # _WORD matches no tab, which separates word and count in the TSV input; it stays a byte piece.
  words = {word: n for word, n in counts.items() if not set(word) & {"\0", _SPACE_MARK}}
  if not words:
    raise errors.CalmError("there is no text to train a tokenizer on")
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
      sentence_iterator=(f"{word}\t{n}" for word, n in words.items()),
      input_format="tsv",
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab_size,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      byte_fallback=True,
      # _WORD has already split the text where pieces end.
      split_by_whitespace=False,
      split_by_unicode_script=False,
      split_by_number=False,
      unk_id=0,
      eos_id=1,
      bos_id=-1,
      pad_id=-1,
      minloglevel=3,
    )
  except (RuntimeError, ValueError) as error:
    # The format is: source line [condition] sentence. Increase vocab_size or set an option.
    reason = str(error).partition("Increase")[0].rpartition("] ")[2].strip()
    raise errors.CalmError(
      f"can't train a tokenizer of {vocab_size} pieces on {sum(words.values())} words: "
      f"{reason or error}"
    ) from error
  files.write(output_path, model.getvalue())
  return load(output_path)
