"""A folder of another framework -> a workdir: ready to evaluate, to write text, to start from."""

import pathlib

from etils import epath

from calm_jax import errors, files, workdir
from calm_jax.data import tokenizer as tokenizer_lib
from calm_jax.interchange import destination, reading
from calm_jax.training import checkpoint, fingerprint

LEAST_SHARE = 0.9  # Of a table's rows that its tokenizer uses; others are padding.


def write(
  source: str,
  output: str,
  autoencoder: str = "",
  tokenizer: str = "",
  allow_nonfinite: bool = False,
) -> None:
  """Writes the model in the folder `source` as the workdir `output`.

  Args:
    autoencoder: folder of a language model's autoencoder, where `source` has none.
    tokenizer: file of the tokenizer, where `source` has none.
    allow_nonfinite: take NaN and infinite weights.

  Raises:
    CalmError: see `reading.read`; also for a tokenizer that is missing or has more
      tokens than the model. No folder is left then.
  """
  checkpoint.require_writable_name(output)
  folder = pathlib.Path(source)
  files.require_reachable(str(folder / "config.json"))
  if not (folder / "config.json").exists():
    raise errors.CalmError(f"--source={source} is no folder with a config.json")
  imported = reading.read(folder, autoencoder, allow_nonfinite)
  loaded = _tokenizer(folder, tokenizer, imported)
  with destination.new_folder(output) as partial:
    codec = imported.autoencoder
    if codec:
      _write(str(partial / workdir.AUTOENCODER), codec, loaded)
    _write(str(partial), imported, loaded)


def _tokenizer(
  folder: pathlib.Path, given: str, imported: reading.Imported
) -> tokenizer_lib.Tokenizer:
  """Returns the given tokenizer, or the one in the folder."""
  found = [str(folder / name) for name in reading.TOKENIZERS if (folder / name).exists()]
  if not given and not found:
    raise errors.CalmError(
      f"{folder} holds no tokenizer ({' or '.join(reading.TOKENIZERS)}): give --tokenizer=FILE, "
      "the one that the model was trained with"
    )
  path = given or found[0]
  files.require_regular(path)
  try:
    loaded = tokenizer_lib.load(path)
  except errors.CalmError:
    if imported.eos_id is None:
      raise
    loaded = tokenizer_lib.load(path, imported.eos_id)  # Its EOS has no well-known name.
  if imported.eos_id is not None and not 0 <= imported.eos_id < loaded.vocab_size:
    raise errors.CalmError(
      f"{folder / 'config.json'} says eos_token_id = {imported.eos_id}, but {path} has "
      f"{loaded.vocab_size} tokens: set the one that ends a text, or null"
    )
  for model in (imported, imported.autoencoder):
    if model and model.vocab_size < loaded.vocab_size:
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


def _write(target: str, imported: reading.Imported, tokenizer: tokenizer_lib.Tokenizer) -> None:
  codec = imported.autoencoder
  origin = workdir.Origin(
    tokenizer_file=epath.Path(tokenizer.path).name,
    tokenizer_hash=tokenizer.hash,
    store_hash="",
    vocab_size=imported.vocab_size,
    eos_id=tokenizer.eos_id,
    appends_eos=imported.eos_id is not None,  # Where it is written, a text ends.
    start_patch=(),
    autoencoder_fingerprint=fingerprint.of(codec.params) if codec else "",
  )
  path = epath.Path(tokenizer.path)
  workdir.write_weights(target, imported.run, origin, imported.params, 0, path)
