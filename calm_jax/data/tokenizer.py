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

# End of document in well-known tokenizer.json files; the first that exists is taken.
EOS_NAMES = (
  "<|end_of_text|>",
  "<|endoftext|>",
  "</s>",
  "<eos>",
  "<|eos|>",
  "[EOS]",
  "<｜end▁of▁sentence｜>",  # noqa: RUF001 -- DeepSeek writes it with these letters.
)

_SPACE_MARK = "▁"  # SentencePiece writes a space so, and decodes this letter to a space.

# What a learned piece may span: a word with the space and punctuation before it,
# punctuation with the newlines after it, runs of newlines. SentencePiece gives each
# space of a run a piece of its own; CHANGELOG.md tells what pieces for runs would do.
_WORD = re.compile(r" ?[^\s\w]*\w+| ?[^\s\w]+(?:\r?\n)*| +|(?:\r?\n)+")


class Tokenizer(abc.ABC):
  """Text to ids and back.

  `encode` never gives EOS or another control id, whatever the text: what looks
  like a special token is encoded as the letters it is written with.

  Attributes:
    path: of the file. hash: the first 16 hex digits of the SHA-256 of its bytes.
    vocab_size: every id is smaller. eos_id: ends a document.
  """

  path: str
  hash: str
  vocab_size: int
  eos_id: int

  def __init__(self, path: str, content: bytes):
    self.path, self.hash = path, hashlib.sha256(content).hexdigest()[:16]

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, without EOS."""

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`; control ids give none."""

  @abc.abstractmethod
  def piece(self, token: int) -> str:
    """Returns how the vocabulary writes an id."""

  @abc.abstractmethod
  def find(self, names: Sequence[str]) -> int | None:
    """Returns the id of the first control token of these names, None without any."""


class _SentencePiece(Tokenizer):
  """A SentencePiece model; decode(encode(x)) == x for those that `train` makes."""

  def __init__(self, path: str, content: bytes):
    super().__init__(path, content)
    self._model = sentencepiece.SentencePieceProcessor()
    self._model.LoadFromSerializedProto(content)
    self.vocab_size = self._model.vocab_size()
    self._mark_ids = self._bytes_of_mark()

  def _bytes_of_mark(self) -> list[int]:
    """Returns the byte pieces of a literal space mark, none if the model can't use them."""
    ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
    adds_prefix = self._model.encode("a", out_type=str)[0].startswith(_SPACE_MARK)
    return ids if all(map(self._model.is_byte, ids)) and not adds_prefix else []

  def encode(self, text: str) -> list[int]:
    if not self._mark_ids or _SPACE_MARK not in text:
      return self._model.encode(text)
    first, *others = self._model.encode(text.split(_SPACE_MARK))
    return first + [token for ids in others for token in self._mark_ids + ids]

  def decode(self, ids: Iterable[int]) -> str:
    known = [int(token) for token in ids if token < self.vocab_size]  # A table may be padded.
    return self._model.decode(known)

  def piece(self, token: int) -> str:
    return self._model.id_to_piece(token)

  def find(self, names: Sequence[str]) -> int | None:
    ids = (self._model.piece_to_id(name) for name in names)
    return next((token for token in ids if self._model.is_control(token)), None)


class _HuggingFace(Tokenizer):
  """A tokenizer.json of the `tokenizers` package, without its template, padding, truncation."""

  def __init__(self, path: str, content: bytes):
    super().__init__(path, content)
    self._model = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    self._model.no_padding()
    self._model.no_truncation()
    self._model.encode_special_tokens = True  # Special tokens in a text are letters.
    # Ids may have gaps, so the count of pieces is not a bound.
    self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
    self._added = {token["content"]: token["id"] for token in json.loads(content)["added_tokens"]}

  def encode(self, text: str) -> list[int]:
    return self._model.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int]) -> str:
    return self._model.decode([int(token) for token in ids], skip_special_tokens=True)

  def piece(self, token: int) -> str:
    return self._model.id_to_token(token) or ""

  def find(self, names: Sequence[str]) -> int | None:
    return next((self._added[name] for name in names if name in self._added), None)


# A new kind of file is a new row.
KINDS = {".model": _SentencePiece, ".json": _HuggingFace}


def load(path: str, eos: str | int = "") -> Tokenizer:
  """Returns the tokenizer in a file.

  Args:
    path: SentencePiece's .model or Hugging Face's tokenizer.json.
    eos: the token that ends a document, by name or id; empty to look it up.

  Raises:
    CalmError: if there is no such file, it can't be read, or its EOS is unclear.
  """
  kind = KINDS.get(pathlib.PurePath(path).suffix)
  if kind is None:
    raise errors.CalmError(
      f"{path!r} is no tokenizer: give a SentencePiece .model, a Hugging Face tokenizer.json "
      "or train:VOCAB"
    )
  try:
    tokenizer = kind(path, epath.Path(path).read_bytes())
  except FileNotFoundError as error:
    raise errors.CalmError(f"no such tokenizer: {path}") from error
  except Exception as error:  # Hugging Face's raises no narrower class.
    reason = " ".join(str(error).split())
    raise errors.CalmError(f"can't read tokenizer {path}: {reason}") from error
  tokenizer.eos_id = eos if isinstance(eos, int) else _eos_id(tokenizer, eos)
  if not 0 <= tokenizer.eos_id < tokenizer.vocab_size:
    raise errors.CalmError(
      f"{path} has {tokenizer.vocab_size} tokens, so no token {tokenizer.eos_id} to end a document"
    )
  if tokenizer.eos_id in tokenizer.encode(tokenizer.piece(tokenizer.eos_id)):
    raise errors.CalmError(
      f"{path} encodes the text {tokenizer.piece(tokenizer.eos_id)!r} as EOS, so documents "
      "that mention it would end there: make it a control or special token"
    )
  return tokenizer


def _eos_id(tokenizer: Tokenizer, name: str) -> int:
  found = tokenizer.find((name,) if name else EOS_NAMES)
  if found is None:
    missing = repr(name) if name else f"none of {', '.join(EOS_NAMES)}"
    raise errors.CalmError(
      f"{tokenizer.path} has no token that ends a document ({missing}): name it with --eos_token"
    )
  return found


def train(texts: Iterable[str], vocab_size: int, output_path: str) -> Tokenizer:
  """Writes a lossless byte-fallback BPE of `vocab_size` pieces, and returns it.

  Two pieces are <unk>, which never occurs, and </s>, the EOS; 256 are bytes. The
  same texts give the same file.

  Raises:
    CalmError: if the texts are too few for the vocabulary or it is too small for them.
  """
  counts = collections.Counter(word for text in texts for word in _WORD.findall(text))
  # A tab would end the word in SentencePiece's input; in a text it is a byte piece.
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
      # _WORD says where pieces end.
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
    # It reads: source line [condition] sentence. Increase vocab_size or set an option.
    reason = str(error).partition("Increase")[0].rpartition("] ")[2].strip()
    raise errors.CalmError(
      f"can't train a tokenizer of {vocab_size} pieces on {sum(words.values())} words: "
      f"{reason or error}"
    ) from error
  files.write(output_path, model.getvalue())
  return load(output_path)
