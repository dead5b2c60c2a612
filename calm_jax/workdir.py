"""Settings and origin of a run <-> the small files of its workdir; weights: `training.trained`.

seal.json         hashes that bind the files below, see `calm_jax.seal`
config.json       the resolved settings
origin.json       what the run was trained on: hashes, vocabulary, first patch
tokenizer.*       a copy, so that the workdir generates text without a token store
checkpoints/      see training.checkpoint
NAME/             the same five entries of each parent, such as stage two's frozen autoencoder
metrics.jsonl evaluation.json temperature.json samples.jsonl   figures and texts
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from calm_jax import config, errors, files, resolve, seal
from calm_jax.data import store as store_lib
from calm_jax.data import tokenizer as tokenizer_lib

METRICS = "metrics.jsonl"
EVALUATION = "evaluation.json"
TRADEOFF = "temperature.json"
SAMPLES = "samples.jsonl"


@dataclasses.dataclass(frozen=True)
class Origin:
  """What a run was trained on.

  Attributes:
    tokenizer_file: name of the tokenizer's copy in the workdir.
    tokenizer_hash: identifies the tokenizer.
    store_hash: identifies the token store; empty for imported weights, which have none.
    vocab_size: vocabulary of the model; larger than the tokenizer's if imported tables are padded.
    eos_id: EOS token of the tokenizer.
    appends_eos: whether documents end with EOS.
    start_patch: the K training tokens before the first end of a document that has K tokens
      before it. Generation puts them before a prompt, so that the prompt starts a document and its
      first patch has a predecessor. Empty for imported weights: their prompts must hold the
      first patch themselves.
    parents: fingerprint of each parent's parameters, by the parent's name.
    format_version: format of the workdir.
  """

  tokenizer_file: str
  tokenizer_hash: str
  store_hash: str
  vocab_size: int
  eos_id: int
  appends_eos: bool
  start_patch: tuple[int, ...]
  parents: Mapping[str, str] = dataclasses.field(default_factory=dict)
  format_version: int = seal.FORMAT_VERSION

  @classmethod
  def of(
    cls,
    store: store_lib.TokenStore,
    patch_size: int,
    vocab_size: int,
    parents: Mapping[str, str],
  ) -> "Origin":
    """Returns the origin of a run on `store`.

    Raises:
      CalmError: if the training split is shorter than a patch.
    """
    ends = [int(end) for end in store.offsets("train")[1:] if end >= patch_size]
    if not ends:
      raise errors.CalmError(f"{store.path} holds less than one patch of {patch_size} tokens")
    end = ends[0]
    tokenizer = store.manifest.tokenizer
    return cls(
      tokenizer_file=tokenizer.file,
      tokenizer_hash=tokenizer.hash,
      store_hash=store.hash,
      vocab_size=vocab_size,
      eos_id=tokenizer.eos_id,
      appends_eos=store.manifest.appends_eos,
      start_patch=tuple(int(token) for token in store.read("train", end - patch_size, end)),
      parents=parents,
    )

  @classmethod
  def of_json(cls, values: Mapping[str, Any], where: str) -> "Origin":
    """Returns the origin stored in origin.json; `where` names the file in errors.

    Raises:
      CalmError: if a value is missing, of a wrong type or outside the vocabulary.
    """
    fields = {name: x for name, x in values.items() if not name.endswith(_FINGERPRINT)}
    parents = {
      name.removesuffix(_FINGERPRINT): x
      for name, x in values.items()
      if name not in fields and x != ""
    }
    try:
      origin = cls(**{**fields, "start_patch": tuple(fields["start_patch"])}, parents=parents)
    except (KeyError, TypeError) as error:
      raise errors.CalmError(f"{where} is not of this version: {error}") from error
    for name, value in origin.values().items():
      kind = _KINDS.get(name, str)
      config.require(
        type(value) is kind and (kind is not str or "/" not in value),
        f"{where}: {name} is {config.shown(value)}",
      )
    size = origin.vocab_size
    config.require(
      1 <= size <= config.LARGEST_INT,
      f"{where}: vocab_size must lie in [1, 2^31), got {config.shown(size)}",
    )
    for token in (origin.eos_id, *origin.start_patch):
      config.require(
        type(token) is int and 0 <= token < size,
        f"{where}: a token must lie in [0, {size}), got {config.shown(token)}",
      )
    return origin

  def hashes(self) -> dict[str, str]:
    """Returns the hashes that a resumed run must share, by name."""
    parents = {name: x for name, x in self.values().items() if name.endswith(_FINGERPRINT)}
    return {"tokenizer_hash": self.tokenizer_hash, "store_hash": self.store_hash, **parents}

  def values(self) -> dict[str, Any]:
    """Returns the contents of origin.json, with one entry for each parent's fingerprint."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    parents = values.pop("parents")
    return values | {f"{name}{_FINGERPRINT}": x for name, x in parents.items()}


# Suffix to a parent's name, under which origin.json stores its fingerprint.
_FINGERPRINT = "_fingerprint"
# Types of the values that are not strings.
_NUMBERS = dict.fromkeys(("vocab_size", "eos_id", "format_version"), int)
_KINDS: dict[str, type] = {**_NUMBERS, "appends_eos": bool, "start_patch": tuple}


def sealed(workdir: str, run: config.Run, origin: Origin, tokenizer: epath.Path) -> seal.Seal:
  """Returns the seal of a new workdir, which must already hold the copies of its parents.

  Raises:
    CalmError: if a file can't be read.
  """
  text = files.to_json(origin.values())
  return seal.make(workdir, resolve.to_json(run), text, tokenizer, origin.parents)


def create(
  workdir: str, run: config.Run, origin: Origin, tokenizer: epath.Path, new_seal: seal.Seal
) -> None:
  """Writes config, origin, tokenizer and seal of a new workdir; config.json comes last.

  Raises:
    CalmError: if the folder can't be written.
  """
  path = epath.Path(workdir)
  try:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.copy(path / origin.tokenizer_file, overwrite=True)
    files.sync(path / origin.tokenizer_file)
  except OSError as error:
    raise errors.CalmError(f"can't write workdir {workdir}: {error}") from error
  files.write(path / "origin.json", files.to_json(origin.values()))
  seal.write(workdir, new_seal)
  files.write(path / "config.json", resolve.to_json(run))


def change_config(workdir: str, run: config.Run) -> None:
  """Writes changed settings of a run that was already started.

  Raises:
    CalmError: if they can't be written.
  """
  text = resolve.to_json(run)
  before, new = seal.read(workdir), seal.of_bytes(text.encode())
  if before.config == (new,):
    return
  # The seal accepts both versions in between, so that an interruption leaves a valid workdir.
  seal.write(workdir, dataclasses.replace(before, config=(*before.config, new)))
  files.write(epath.Path(workdir) / "config.json", text)
  seal.write(workdir, dataclasses.replace(before, config=(new,)))


def append_samples(workdir: str, lines: list[str]) -> None:
  """Appends generated texts to the workdir's samples.jsonl.

  A last line that a kill cut short is terminated first.

  Raises:
    CalmError: if they can't be written.
  """
  path, is_cut = epath.Path(workdir) / SAMPLES, False
  if path.exists():
    files.require_regular(path)
    with path.open("rb") as file:
      if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        is_cut = file.read(1) != b"\n"
  files.append(path, "\n" * is_cut + "".join(lines))


def exists(workdir: str) -> bool:
  """Returns whether a run was started in this folder."""
  return (epath.Path(workdir) / "config.json").exists()


def read_config(workdir: str) -> dict[str, Any]:
  """Returns the contents of a workdir's config.json, as the run wrote it.

  Raises:
    CalmError: if there is none, or it can't be read.
  """
  return _read_json(workdir, "config.json")


def read_origin(workdir: str) -> Origin:
  """Returns the origin of a workdir's run.

  Raises:
    CalmError: if there is none, or it can't be read.
  """
  return Origin.of_json(_read_json(workdir, "origin.json"), f"{workdir}/origin.json")


def _read_json(workdir: str, name: str) -> dict[str, Any]:
  path = epath.Path(workdir) / name
  files.require_reachable(str(path))
  if not workdir or not path.exists():
    raise errors.CalmError(
      f"no workdir at {workdir!r} ({name} is missing): give the --workdir of a training run"
    )
  return files.parse_json(seal.read_part(workdir, name), str(path))


def require_intact(workdir: str) -> None:
  """Raises CalmError unless config, origin, tokenizer and parents are those the run wrote."""
  read_config(workdir)
  seal.require_tokenizer(workdir, read_origin(workdir).tokenizer_file)
  seal.require_parents(workdir)


def require_parent_weights(workdir: str, origin: Origin, name: str, fingerprint: str) -> None:
  """Raises CalmError unless a parent's weights have the fingerprint in origin.json."""
  expected = origin.parents.get(name, "")
  if fingerprint != expected:
    raise errors.CalmError(
      f"{epath.Path(workdir) / name} holds weights of fingerprint {fingerprint}, but {workdir} "
      f"was trained with those of {expected}: restore the original {name}"
    )


def tokenizer(workdir: str, origin: Origin) -> tokenizer_lib.Tokenizer:
  """Returns the workdir's own copy of its tokenizer.

  Raises:
    CalmError: if it is missing or not the one that the run was trained with.
  """
  path = epath.Path(workdir) / origin.tokenizer_file
  loaded = tokenizer_lib.load(str(path), eos=origin.eos_id)
  if loaded.hash != origin.tokenizer_hash:
    raise errors.CalmError(
      f"{path} has hash {loaded.hash}, but the model was trained with {origin.tokenizer_hash}: "
      "restore the original file"
    )
  return loaded


def require_same_tokenizer(origin: Origin, store: store_lib.TokenStore, workdir: str) -> None:
  """Raises CalmError, naming both hashes, unless store and workdir share a tokenizer."""
  store_tokenizer = store.manifest.tokenizer.hash
  if store_tokenizer != origin.tokenizer_hash:
    raise errors.CalmError(
      f"the token store {store.path} was written with tokenizer {store_tokenizer}, but {workdir} "
      f"was trained with tokenizer {origin.tokenizer_hash}: prepare the text with --tokenizer="
      f"{epath.Path(workdir) / origin.tokenizer_file}"
    )


def require_trainable(workdir: str) -> None:
  """Raises CalmError if a workdir holds weights only, as one written by convert does."""
  if not read_origin(workdir).store_hash:
    raise errors.CalmError(
      f"{workdir} holds imported weights, but no training run to resume: start one from them in a "
      f"new --workdir with --config.start_from={workdir}"
    )


def require_same_data(workdir: str, origin: Origin) -> None:
  """Raises CalmError, naming the hashes, unless the workdir's run was started on the same data."""
  stored, current = read_origin(workdir).hashes(), origin.hashes()
  for name, before in stored.items():
    now = current.get(name, "")
    if before != now:
      raise errors.CalmError(
        f"{workdir} was trained with {name} {before}, but it is now {now}: give the same data or "
        "a new --workdir"
      )
