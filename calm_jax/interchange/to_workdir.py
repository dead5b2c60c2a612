"""A folder of another framework -> a workdir, to evaluate, generate from, or train further."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from calm_jax import errors, files, workdir
from calm_jax.data import tokenizer as tokenizer_lib
from calm_jax.interchange import destination, reading
from calm_jax.training import checkpoint, fingerprint, trained

LEAST_SHARE = 0.9  # Least share of a token table that its tokenizer uses; the rest is padding.


def write(
  source: str,
  output: str,
  autoencoder: str = "",
  tokenizer: str = "",
  allow_nonfinite: bool = False,
  *,
  run_of: Callable[[reading.Imported], Any],
) -> None:
  """Writes the model in the folder `source` as the workdir `output`.

  Leaves no folder after an error.

  Args:
    source: the folder.
    output: path of the new workdir.
    autoencoder: folder of a language model's autoencoder, if `source` has none.
    tokenizer: file of the tokenizer, if `source` has none.
    allow_nonfinite: accept NaN and infinite weights.
    run_of: returns the settings of a model as those of its stage.

  Raises:
    CalmError: see `reading.read`; also if the tokenizer is missing or does not fit the model.
  """
  checkpoint.require_writable_name(output)
  folder = pathlib.Path(source)
  files.require_reachable(str(folder / "config.json"))
  if not (folder / "config.json").exists():
    raise errors.CalmError(f"--source={source} is not a folder with a config.json")
  imported = reading.read(folder, autoencoder, allow_nonfinite)
  loaded = _tokenizer(folder, tokenizer, imported)
  with destination.new_folder(output) as partial:
    _write(partial, imported, loaded, run_of)


def _tokenizer(
  folder: pathlib.Path, override: str, imported: reading.Imported
) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer in the file `override`; if that is empty, the one in the folder."""
  own = [str(folder / name) for name in reading.TOKENIZERS if (folder / name).exists()]
  if not override and not own:
    raise errors.CalmError(
      f"{folder} holds no tokenizer ({' or '.join(reading.TOKENIZERS)}): give --tokenizer=FILE, "
      "the one that the model was trained with"
    )
  path = override or own[0]
  files.require_regular(path)
  try:
    loaded = tokenizer_lib.load(path)
  except errors.CalmError:
    if imported.eos_id is None:
      raise
    loaded = tokenizer_lib.load(path, imported.eos_id)  # Its EOS may have an unusual name.
  if imported.eos_id is not None and not 0 <= imported.eos_id < loaded.vocab_size:
    raise errors.CalmError(
      f"{folder / 'config.json'} says eos_token_id = {imported.eos_id}, but {path} has "
      f"{loaded.vocab_size} tokens: set it to the token that ends a text, or to null"
    )
  for model in (imported, *_ancestors(imported)):
    if model.vocab_size < loaded.vocab_size:
      raise errors.CalmError(
        f"{path} has {loaded.vocab_size} tokens, but the model's table has {model.vocab_size}: "
        "give --tokenizer=FILE, the one that the model was trained with"
      )
  if loaded.vocab_size < LEAST_SHARE * imported.vocab_size:
    raise errors.CalmError(
      f"{path} has {loaded.vocab_size} tokens, far fewer than the {imported.vocab_size} rows of "
      "the model's table: give --tokenizer=FILE, the one that the model was trained with"
    )
  return loaded


def _ancestors(imported: reading.Imported) -> Iterator[reading.Imported]:
  for parent in imported.parents.values():
    yield parent
    yield from _ancestors(parent)


def _write(
  folder: pathlib.Path,
  imported: reading.Imported,
  tokenizer: tokenizer_lib.Tokenizer,
  run_of: Callable[[reading.Imported], Any],
) -> None:
  """Writes a model as a workdir, with those of its parents inside."""
  for name, parent in imported.parents.items():
    _write(folder / name, parent, tokenizer, run_of)
  origin = workdir.Origin(
    tokenizer_file=epath.Path(tokenizer.path).name,
    tokenizer_hash=tokenizer.hash,
    store_hash="",
    vocab_size=imported.vocab_size,
    eos_id=tokenizer.eos_id,
    appends_eos=imported.eos_id is not None,  # So that generation ends at EOS.
    start_patch=(),
    parents={name: fingerprint.of(parent.params) for name, parent in imported.parents.items()},
  )
  trained.write(str(folder), run_of(imported), origin, imported.params, 0, tokenizer.path)
