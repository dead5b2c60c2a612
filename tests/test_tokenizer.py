"""Claims about tokenizers: lossless, deterministic, and no text is encoded as a control id."""

import json
import os
import pathlib
import types

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from calm_jax import errors, workdir
from calm_jax.data import tokenizer as tokenizer_lib

CORPUS = [
  "def f(self, x):\n    if x:\n        return self.f(x)\n    return 3.14\n\n\n" * 3,
  "The quick brown fox jumps over the lazy dog, again and again.\r\n" * 3,
]
NASTY = [
  "",
  " ",
  "a",
  "  leading and trailing  ",
  "\t\ttabs\tinside\t",
  "line\r\nline\rline\n\n\n    indented",
  "multiple    spaces\n \n",
  "café, naïve, 日本語, 🙂🏽, e\u0301",
  "\ufeffmark, no-break\u00a0space, zero\u200bwidth, line\u2028separator, \x85 \x0b \x00",
  "▁ is SentencePiece's space, ▁▁ twice, and at the end ▁",
  "⁇ <unk> <s> </s> <0x0A> <|endoftext|> <|end_of_text|>",
  "\U0010ffff\ufffd",
  "ﬁ ² Å ½ \uff21\uff22",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tokenizer_lib.Tokenizer:
  path = tmp_path_factory.mktemp("trained") / "tokenizer.model"
  return tokenizer_lib.train(CORPUS, 330, str(path))


def hugging_face(path: pathlib.Path, specials: list[str], template: bool = False) -> str:
  """Writes a byte-level BPE, by default without a template that adds special tokens."""
  model = tokenizers.Tokenizer(models.BPE())
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
  )
  model.train_from_iterator(CORPUS, trainer)
  if template:
    pair = (specials[0], model.token_to_id(specials[0]))
    model.post_processor = tokenizers.processors.TemplateProcessing(
      single=f"{specials[0]} $A", special_tokens=[pair]
    )
    model.enable_truncation(4)
    model.enable_padding(length=8)
  model.save(str(path))
  return str(path)


@pytest.mark.parametrize("text", NASTY + CORPUS)
def test_a_trained_tokenizer_is_lossless_and_returns_no_control_ids(
  trained: tokenizer_lib.Tokenizer, text: str
):
  ids = trained.encode(text)
  assert trained.decode(ids) == text
  assert not {0, trained.eos_id} & set(ids)
  assert max(ids, default=0) < trained.vocab_size == 330


@pytest.mark.parametrize("text", NASTY + CORPUS)
def test_a_hugging_face_tokenizer_encodes_special_tokens_in_text_as_characters(
  tmp_path: pathlib.Path, text: str
):
  path = hugging_face(tmp_path / "tokenizer.json", ["<s>", "<|endoftext|>"], template=True)
  loaded = tokenizer_lib.load(path)
  ids = loaded.encode(text)
  assert loaded.decode(ids) == text
  assert not {0, loaded.eos_id} & set(ids)


def test_training_twice_gives_the_same_file(
  tmp_path: pathlib.Path, trained: tokenizer_lib.Tokenizer
):
  again = tokenizer_lib.train(iter(CORPUS), 330, str(tmp_path / "again.model"))
  assert again.hash == trained.hash
  assert pathlib.Path(again.path).read_bytes() == pathlib.Path(trained.path).read_bytes()


def test_each_space_of_an_indentation_is_a_piece_and_newlines_share_one(
  trained: tokenizer_lib.Tokenizer,
):
  assert len(trained.encode("    ")) == 4
  assert len(trained.encode("\n\n\n")) < 3


def test_eos_has_no_text(trained: tokenizer_lib.Tokenizer):
  ids = trained.encode("a b")
  assert trained.decode([*ids, trained.eos_id]) == "a b"


@pytest.mark.parametrize("name", ["<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>"])
def test_well_known_names_of_eos_are_found(tmp_path: pathlib.Path, name: str):
  loaded = tokenizer_lib.load(hugging_face(tmp_path / "tokenizer.json", ["<pad>", name]))
  assert loaded.eos_id == 1


def test_an_unusual_eos_must_be_named(tmp_path: pathlib.Path):
  path = hugging_face(tmp_path / "tokenizer.json", ["<pad>", "<fin>"])
  with pytest.raises(errors.CalmError, match=r"no token that ends a document .*--eos_token"):
    tokenizer_lib.load(path)
  with pytest.raises(errors.CalmError, match=r"'<end>'.*--eos_token"):
    tokenizer_lib.load(path, eos="<end>")
  assert tokenizer_lib.load(path, eos="<fin>").eos_id == tokenizer_lib.load(path, eos=1).eos_id == 1


def test_an_eos_that_text_can_produce_is_refused(tmp_path: pathlib.Path):
  path = pathlib.Path(hugging_face(tmp_path / "tokenizer.json", ["</s>"]))
  content = json.loads(path.read_text())
  content["added_tokens"][0]["special"] = False
  path.write_text(json.dumps(content))
  with pytest.raises(errors.CalmError, match="encodes the text '</s>' as EOS"):
    tokenizer_lib.load(str(path))


@pytest.mark.parametrize("eos", [-1, 330, 2**31, 2**40])
def test_an_eos_outside_the_vocabulary_is_refused(
  trained: tokenizer_lib.Tokenizer, tmp_path: pathlib.Path, eos: int
):
  for path in (trained.path, hugging_face(tmp_path / "tokenizer.json", ["</s>"])):
    with pytest.raises(errors.CalmError, match=f"has no token {eos} to end documents with"):
      tokenizer_lib.load(path, eos)


def test_the_id_of_eos_is_the_models_and_not_the_files(tmp_path: pathlib.Path):
  path = pathlib.Path(hugging_face(tmp_path / "tokenizer.json", ["</s>"]))
  content = json.loads(path.read_text())
  content["added_tokens"][0]["id"] = 250
  path.write_text(json.dumps(content))
  assert tokenizer_lib.load(str(path)).eos_id == 0


def test_a_pipe_and_a_device_are_refused_and_do_not_block(tmp_path: pathlib.Path):
  os.mkfifo(tmp_path / "a.model")
  (tmp_path / "b.json").symlink_to("/dev/zero")
  for name in ("a.model", "b.json"):
    with pytest.raises(errors.CalmError, match=f"{name} is a pipe, a device"):
      tokenizer_lib.load(str(tmp_path / name))


def test_a_file_too_large_for_a_tokenizer_is_not_read(tmp_path: pathlib.Path):
  with open(tmp_path / "a.model", "wb") as file:
    file.truncate(2**40)  # A sparse file.
  with pytest.raises(errors.CalmError, match=r"it has 1,099,511,627,776 bytes, the limit is"):
    tokenizer_lib.load(str(tmp_path / "a.model"))


def test_ids_beyond_31_bits_are_refused(tmp_path: pathlib.Path):
  path = pathlib.Path(hugging_face(tmp_path / "tokenizer.json", ["</s>"]))
  content = json.loads(path.read_text())
  content["model"]["vocab"]["gap"] = 2**31
  path.write_text(json.dumps(content))
  with pytest.raises(errors.CalmError, match=r"its ids go up to 2,147,483,648, they must lie in"):
    tokenizer_lib.load(str(path))


def test_a_text_that_can_not_be_encoded_is_an_error(tmp_path: pathlib.Path):
  model = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="<unk>"))
  model.pre_tokenizer = pre_tokenizers.Whitespace()
  model.add_special_tokens(["</s>"])
  model.encode_special_tokens = True
  path = tmp_path / "tokenizer.json"
  model.save(str(path))
  with pytest.raises(
    errors.CalmError, match=r"tokenizer\.json can't encode a text: WordLevel error"
  ):
    tokenizer_lib.load(str(path)).encode("b")


class Panic(BaseException):
  """Derives from BaseException, like the exceptions of Rust's panics."""


def panic(*arguments, **named):
  raise Panic("index out\nof bounds")


def test_a_panic_of_the_library_is_reported_in_one_line(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  path = hugging_face(tmp_path / "tokenizer.json", ["</s>"])
  loaded = tokenizer_lib.load(path)
  loaded._model = types.SimpleNamespace(encode=panic)
  with pytest.raises(errors.CalmError, match="can't encode a text: index out of bounds"):
    loaded.encode("a")
  monkeypatch.setattr(tokenizers, "Tokenizer", types.SimpleNamespace(from_str=panic))
  with pytest.raises(errors.CalmError, match=r"can't read tokenizer .*: index out of bounds"):
    tokenizer_lib.load(path)


def test_the_vocabulary_bounds_ids_that_have_gaps(tmp_path: pathlib.Path):
  path = pathlib.Path(hugging_face(tmp_path / "tokenizer.json", ["</s>"]))
  content = json.loads(path.read_text())
  content["model"]["vocab"]["gap"] = 1000
  path.write_text(json.dumps(content))
  assert tokenizer_lib.load(str(path)).vocab_size == 1001


@pytest.mark.parametrize(
  ("name", "content", "reason"),
  [
    ("a.model", b"", "can't read tokenizer"),
    ("a.model", b"no model", "can't read tokenizer"),
    ("a.json", b"{}", "can't read tokenizer"),
    ("a.json", b"[" * 10**6, "can't read tokenizer"),
    ("a.json", b"[]", "can't read tokenizer"),
    ("a.json", b"\xff", "can't read tokenizer"),
    ("a.model", None, "no such tokenizer"),
    ("a.bpe", b"", "is not a tokenizer"),
    ("train", None, "is not a tokenizer"),
  ],
)
def test_a_bad_file_is_reported_in_one_line(
  tmp_path: pathlib.Path, name: str, content: bytes | None, reason: str
):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(errors.CalmError, match=reason) as caught:
    tokenizer_lib.load(str(tmp_path / name))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("texts", "vocab_size", "reason"),
  [
    (CORPUS, 0, "can't train a tokenizer of 0 pieces"),
    (CORPUS, 200, "smaller than required"),
    (CORPUS, 100_000, "too high"),
    ([], 1024, "no text"),
    (["\t\t"], 1024, "no text"),
  ],
)
def test_a_vocabulary_that_does_not_fit_writes_nothing(
  tmp_path: pathlib.Path, texts: list[str], vocab_size: int, reason: str
):
  with pytest.raises(errors.CalmError, match=reason) as caught:
    tokenizer_lib.train(texts, vocab_size, str(tmp_path / "a.model"))
  assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_padded_ids_decode_to_nothing(trained_transformer):
  origin = workdir.read_origin(str(trained_transformer))
  tokenizer = workdir.tokenizer(str(trained_transformer), origin)
  assert tokenizer.decode([20, tokenizer.vocab_size, 21]) == tokenizer.decode([20, 21])
