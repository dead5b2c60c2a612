"""A token store of random tokens, to benchmark or try a machine without a corpus."""

import atexit
import functools
import pathlib
import shutil
import tempfile

import numpy as np
import tokenizers

from calm_jax import errors
from calm_jax.data import holdout, store, store_writer, tokenizer

PREFIX = "synthetic:"
TOKENS = {"train": 2**22, "heldout": 2**19}  # Per split.
DOCUMENT = 1024  # Tokens per document.


def open_store(path: str) -> store.TokenStore:
  """Returns the store at `path`; for synthetic:V, a store of random tokens below V.

  The random tokens depend on V alone.

  Raises:
    CalmError: see `TokenStore.open`; also if V is not a valid vocabulary size.
  """
  if not path.startswith(PREFIX):
    return store.TokenStore.open(path)
  size = path.removeprefix(PREFIX)
  if not size.isdecimal() or not 3 <= int(size) < 2**31:
    raise errors.CalmError(
      f"config.data.path is {path!r}: give {PREFIX}V for a vocabulary of V tokens, such as "
      f"{PREFIX}32000"
    )
  return _write(int(size))


@functools.cache
def _write(vocab_size: int) -> store.TokenStore:
  """Writes a store of random tokens to a temporary folder and returns it."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="calm_jax_synthetic_"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  words = {"<unk>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, vocab_size)}}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  model.add_special_tokens(["</s>"])
  model.save(str(folder / "words.json"))
  generator = np.random.default_rng(0)
  contents = {
    split: store_writer.SplitContent(
      num_tokens=count,
      num_documents=count // DOCUMENT,
      tokens=[generator.integers(0, vocab_size, count)],
      lengths=[np.full(count // DOCUMENT, DOCUMENT)],
    )
    for split, count in TOKENS.items()
  }
  share = TOKENS["heldout"] / sum(TOKENS.values())
  provenance = store_writer.Provenance(
    sources=(), appends_eos=False, heldout=share, heldout_by=holdout.DOCUMENTS
  )
  words_tokenizer = tokenizer.load(str(folder / "words.json"))
  return store_writer.write(str(folder / "tokens"), words_tokenizer, contents, provenance)
