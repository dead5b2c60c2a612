"""Random tokens in place of a corpus: to measure, and to try a machine, without one."""

import atexit
import functools
import pathlib
import shutil
import tempfile

import numpy as np
import tokenizers

from calm_jax import errors
from calm_jax.data import holdout, store, tokenizer

PREFIX = "synthetic:"
TOKENS = {"train": 2**22, "heldout": 2**19}
DOCUMENT = 1024


def open_store(path: str) -> store.TokenStore:
  """Returns the store at `path`, or, of synthetic:V, one of random tokens below V.

  The tokens of a V are always the same.

  Raises:
    CalmError: as `TokenStore.open`; or if V is no size of a vocabulary.
  """
  if not path.startswith(PREFIX):
    return store.TokenStore.open(path)
  size = path.removeprefix(PREFIX)
  if not size.isdecimal() or not 3 <= int(size) < 2**31:
    raise errors.CalmError(
      f"config.data.path is {path!r}: give {PREFIX}V with a vocabulary of V tokens, as "
      f"{PREFIX}32000"
    )
  return _write(int(size))


@functools.cache
def _write(vocab_size: int) -> store.TokenStore:
  folder = pathlib.Path(tempfile.mkdtemp(prefix="calm_jax_synthetic_"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  words = {"<unk>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, vocab_size)}}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  model.add_special_tokens(["</s>"])
  model.save(str(folder / "words.json"))
  generator = np.random.default_rng(0)
  contents = {
    split: store.Content(
      count,
      count // DOCUMENT,
      [generator.integers(0, vocab_size, count)],
      [np.full(count // DOCUMENT, DOCUMENT)],
    )
    for split, count in TOKENS.items()
  }
  return store.write(
    str(folder / "tokens"), tokenizer.load(str(folder / "words.json")), contents, [],
    appends_eos=False, heldout=TOKENS["heldout"] / sum(TOKENS.values()),
    heldout_by=holdout.DOCUMENTS, skipped_lines=0,
  )  # fmt: skip
