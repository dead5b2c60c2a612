"""What a workdir holds, and how to read it: config, origin, tokenizer, weights.

seal.json         hashes that bind what follows, see `calm_jax.seal`
config.json       the resolved settings
origin.json       what they were trained on: hashes, vocabulary, first patch
tokenizer.*       a copy, so that the workdir needs no token store to write text
checkpoints/      see training.checkpoint
autoencoder/      stage two only: the same five of its frozen autoencoder
metrics.jsonl evaluation.json temperature.json samples.jsonl   figures and texts
"""

import dataclasses
import os
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from jax import numpy as jnp

from calm_jax import config, distributed, errors, files, seal
from calm_jax.data import store as store_lib
from calm_jax.data import tokenizer as tokenizer_lib
from calm_jax.models import autoencoder, calm, transformer
from calm_jax.parallel import mesh, rules
from calm_jax.training import checkpoint

Params = Any

AUTOENCODER = "autoencoder"
METRICS = "metrics.jsonl"
EVALUATION = "evaluation.json"
TRADEOFF = "temperature.json"
SAMPLES = "samples.jsonl"


@dataclasses.dataclass(frozen=True)
class Origin:
  """What a run was trained on.

  Attributes:
    tokenizer_file: name of the copy in the workdir. tokenizer_hash, store_hash:
      identify tokenizer and token store. Imported weights have no store: it is empty.
    vocab_size: of the model; above the tokenizer's where imported tables are padded.
    eos_id: of the tokenizer. appends_eos: whether documents end with EOS.
    start_patch: the K tokens up to the end of the first training document that has
      so many before its end. Generation puts them in front, so that a prompt stands
      at the start of a document and even the first patch has one before it. Imported
      weights have none: a prompt must then hold the first patch itself.
    autoencoder_fingerprint: of stage two's frozen parameters, else empty.
    format_version: of the workdir.
  """

  tokenizer_file: str
  tokenizer_hash: str
  store_hash: str
  vocab_size: int
  eos_id: int
  appends_eos: bool
  start_patch: tuple[int, ...]
  autoencoder_fingerprint: str = ""
  format_version: int = seal.FORMAT_VERSION

  @classmethod
  def of(
    cls,
    store: store_lib.TokenStore,
    patch_size: int,
    vocab_size: int,
    autoencoder_fingerprint: str = "",
  ) -> "Origin":
    """Returns the origin of a run on `store`.

    Raises:
      CalmError: if the training split is shorter than a patch.
    """
    ends = [int(end) for end in store.offsets("train")[1:] if end >= patch_size]
    if not ends:
      raise errors.CalmError(f"{store.path} holds less than a patch of {patch_size} tokens")
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
      autoencoder_fingerprint=autoencoder_fingerprint,
    )

  @classmethod
  def of_json(cls, values: Mapping[str, Any], where: str) -> "Origin":
    """Returns the origin that origin.json holds; `where` names it in errors.

    Raises:
      CalmError: if a value is missing, of a wrong type or outside the vocabulary.
    """
    try:
      origin = cls(**{**values, "start_patch": tuple(values["start_patch"])})
    except (KeyError, TypeError) as error:
      raise errors.CalmError(f"{where} is not of this version: {error}") from error
    for field in dataclasses.fields(cls):
      value, kind = getattr(origin, field.name), typing.get_origin(field.type) or field.type
      config.require(
        type(value) is kind and (kind is not str or "/" not in value),
        f"{where}: {field.name} is {config.shown(value)}",
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


def sealed(workdir: str, run: config.Run, origin: Origin, tokenizer: epath.Path) -> seal.Seal:
  """Returns the seal of a new workdir, whose autoencoder, if it has one, lies there already.

  Raises:
    CalmError: if a file can't be read.
  """
  return seal.make(workdir, config.to_json(run), _origin_json(origin), tokenizer)


def _origin_json(origin: Origin) -> str:
  return files.to_json(dataclasses.asdict(origin))


def create(
  workdir: str, run: config.Run, origin: Origin, tokenizer: epath.Path, made: seal.Seal
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
  files.write(path / "origin.json", _origin_json(origin))
  seal.write(workdir, made)
  files.write(path / "config.json", config.to_json(run))


def change_config(workdir: str, run: config.Run) -> None:
  """Writes the settings of a workdir that has begun, where they are others than before.

  Raises:
    CalmError: if they can't be written.
  """
  text = config.to_json(run)
  before, new = seal.read(workdir), seal.of_bytes(text.encode())
  if before.config == (new,):
    return
  # Whenever this is cut short, the seal knows the config.json that is there.
  seal.write(workdir, dataclasses.replace(before, config=(*before.config, new)))
  files.write(epath.Path(workdir) / "config.json", text)
  seal.write(workdir, dataclasses.replace(before, config=(new,)))


def keep_samples(workdir: str, lines: list[str]) -> None:
  """Appends written texts to the workdir's own, on lines of their own.

  What a kill cut the last line to stays there, and ends first.

  Raises:
    CalmError: if they can't be written.
  """
  path, torn = epath.Path(workdir) / SAMPLES, False
  if path.exists():
    files.require_regular(path)
    with path.open("rb") as file:
      if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        torn = file.read(1) != b"\n"
  files.append(path, "\n" * torn + "".join(lines))


def exists(workdir: str) -> bool:
  """Tells whether a run was started in this folder."""
  return (epath.Path(workdir) / "config.json").exists()


def read_run(workdir: str) -> config.Run:
  """Returns the settings of a workdir.

  Raises:
    CalmError: if there is none, or it can't be read.
  """
  return config.from_mapping(_read_json(workdir, "config.json"))


def read_origin(workdir: str) -> Origin:
  """Returns what the workdir's run was trained on.

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


def require_whole(workdir: str) -> None:
  """Raises CalmError unless config, origin, tokenizer and autoencoder are the run's own."""
  read_run(workdir)
  seal.require_tokenizer(workdir, read_origin(workdir).tokenizer_file)
  seal.require_autoencoder(workdir)


def require_autoencoder_weights(workdir: str, origin: Origin, found: str) -> None:
  """Raises CalmError unless the autoencoder's weights have the fingerprint in origin.json."""
  if found != origin.autoencoder_fingerprint:
    raise errors.CalmError(
      f"{epath.Path(workdir) / AUTOENCODER} holds weights of fingerprint {found}, but {workdir} "
      f"was trained with those of {origin.autoencoder_fingerprint}: put back the autoencoder that "
      "was there"
    )


def tokenizer(workdir: str, origin: Origin) -> tokenizer_lib.Tokenizer:
  """Returns the workdir's own copy of its tokenizer.

  Raises:
    CalmError: if it is missing or not the one trained with.
  """
  path = epath.Path(workdir) / origin.tokenizer_file
  loaded = tokenizer_lib.load(str(path), eos=origin.eos_id)
  if loaded.hash != origin.tokenizer_hash:
    raise errors.CalmError(
      f"{path} has hash {loaded.hash}, but the model was trained with {origin.tokenizer_hash}: put "
      "back the one that was there"
    )
  return loaded


def require_same_tokenizer(origin: Origin, store: store_lib.TokenStore, workdir: str) -> None:
  """Raises CalmError, naming both hashes, unless store and workdir share a tokenizer."""
  found = store.manifest.tokenizer.hash
  if found != origin.tokenizer_hash:
    raise errors.CalmError(
      f"the token store {store.path} was written with tokenizer {found}, but {workdir} was "
      f"trained with tokenizer {origin.tokenizer_hash}: prepare the text with --tokenizer="
      f"{epath.Path(workdir) / origin.tokenizer_file}"
    )


def require_trainable(workdir: str) -> None:
  """Raises CalmError where a workdir holds weights only, as those that convert writes do."""
  if not read_origin(workdir).store_hash:
    raise errors.CalmError(
      f"{workdir} holds imported weights, and nothing to go on training from: train on from them "
      f"in a new --workdir with --config.start_from={workdir}"
    )


def require_same_data(workdir: str, origin: Origin) -> None:
  """Raises CalmError, naming the hashes, unless the workdir's run began on the same data."""
  begun = read_origin(workdir)
  for name in ("tokenizer_hash", "store_hash", "autoencoder_fingerprint"):
    before, now = getattr(begun, name), getattr(origin, name)
    if before != now:
      raise errors.CalmError(
        f"{workdir} was trained with {name} {before}, now it is {now}: give the same data or a "
        "new --workdir"
      )


@dataclasses.dataclass(frozen=True)
class TrainedAutoencoder:
  """Stage one, ready to use. `fingerprint` is of its parameters."""

  run: config.AutoencoderRun
  origin: Origin
  params: Params
  step: int
  fingerprint: str = ""

  def module(self, dtype: str) -> autoencoder.Autoencoder:
    """Returns the module, computing in `dtype`."""
    return autoencoder.Autoencoder(self.run.model, self.origin.vocab_size, jnp.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class TrainedCalm:
  """Stage two with its autoencoder, ready to use."""

  run: config.CalmRun
  origin: Origin
  params: Params
  step: int
  autoencoder: TrainedAutoencoder
  model: calm.Calm


@dataclasses.dataclass(frozen=True)
class TrainedTransformer:
  """The baseline, ready to use."""

  run: config.TransformerRun
  origin: Origin
  params: Params
  step: int
  model: transformer.Transformer


Trained = TrainedAutoencoder | TrainedCalm | TrainedTransformer


def has_checkpoint(workdir: str) -> bool:
  """Tells whether a run has saved anything yet."""
  checkpoints = checkpoint.Checkpoints(workdir)
  steps = checkpoints.steps()
  checkpoints.close()
  return bool(steps)


def _restore(workdir: str, params: Params) -> checkpoint.Restored:
  checkpoints = checkpoint.Checkpoints(workdir, concurrent_gb=checkpoint.few_gb(params))
  bound = seal.read(workdir).bound
  restored = checkpoints.restore(rules.abstract(params, mesh.current()), bound=bound)
  checkpoints.close()
  if restored is None:
    raise errors.CalmError(f"{workdir} has no checkpoint yet: train it first")
  return restored


def _load_autoencoder(
  workdir: str, run: config.AutoencoderRun, origin: Origin
) -> TrainedAutoencoder:
  model = autoencoder.Autoencoder(run.model, origin.vocab_size)
  restored = _restore(workdir, jax.eval_shape(model.initial, jax.random.key(0)))
  fingerprint = restored.meta["params_fingerprint"]
  return TrainedAutoencoder(run, origin, restored.params, restored.step, fingerprint)


def _load_calm(workdir: str, run: config.CalmRun, origin: Origin) -> TrainedCalm:
  own = str(epath.Path(workdir) / AUTOENCODER)
  codec = load_autoencoder(own)
  require_autoencoder_weights(workdir, origin, codec.fingerprint)
  model = calm.Calm.build(run, codec.module(run.training.compute_dtype), origin.vocab_size)
  restored = _restore(workdir, jax.eval_shape(model.init, jax.random.key(0)))
  return TrainedCalm(run, origin, restored.params, restored.step, codec, model)


def _load_transformer(
  workdir: str, run: config.TransformerRun, origin: Origin
) -> TrainedTransformer:
  dtype = jnp.dtype(run.training.compute_dtype)
  model = transformer.Transformer(run.model, origin.vocab_size, dtype)
  restored = _restore(workdir, jax.eval_shape(model.initial, jax.random.key(0)))
  return TrainedTransformer(run, origin, restored.params, restored.step, model)


_LOADERS: dict[str, Callable[..., Trained]] = {
  "autoencoder": _load_autoencoder,
  "calm": _load_calm,
  "transformer": _load_transformer,
}
_NAMES = {
  "autoencoder": "an autoencoder",
  "calm": "a CALM language model",
  "transformer": "a Transformer baseline",
}


def load(workdir: str, stage: str = "") -> Trained:
  """Returns the newest readable weights of a workdir, ready to use.

  Raises:
    CalmError: if there are none there, they are not of the stage that is asked for, or a
      part of the workdir is not the run's own.
  """
  require_whole(workdir)
  run, origin = read_run(workdir), read_origin(workdir)
  if stage and run.stage != stage:
    raise errors.CalmError(f"{workdir} holds {_NAMES[run.stage]}, not {_NAMES[stage]}")
  return _LOADERS[run.stage](workdir, run, origin)


def load_autoencoder(workdir: str) -> TrainedAutoencoder:
  """`load` for stage one."""
  return typing.cast(TrainedAutoencoder, load(workdir, "autoencoder"))


def load_calm(workdir: str) -> TrainedCalm:
  """`load` for stage two."""
  return typing.cast(TrainedCalm, load(workdir, "calm"))


def write_weights(
  target: str, run: config.Run, origin: Origin, params: Params, step: int, tokenizer: epath.Path
) -> None:
  """Writes weights that are not trained on there as a workdir.

  Raises:
    CalmError: if it can't be written.
  """
  checkpoint.require_writable_name(target)
  few = checkpoint.few_gb(params)
  made = sealed(target, run, origin, tokenizer)
  checkpoints = checkpoint.Checkpoints(target, keep_latest=1, concurrent_gb=few)
  saved = checkpoints.save(step, params, None, {"seal": made.bound})
  if not distributed.everywhere("weights saved", checkpoints.wait() and saved):
    checkpoints.close()
    raise errors.CalmError(f"can't write the weights to {target}")
  checkpoints.prove()
  checkpoints.close()
  distributed.on_first("weights", lambda: create(target, run, origin, tokenizer, made))


def copy_autoencoder(trained: TrainedAutoencoder, source: str, target: str) -> None:
  """Writes a frozen autoencoder as a workdir of its own, in place of what lies there.

  Raises:
    CalmError: if it can't be written.
  """

  def clear() -> None:
    path = epath.Path(target)
    trained_there = any((path / name).exists() for name in (METRICS, "ledger"))
    if trained_there or os.path.realpath(source) == os.path.realpath(target):
      raise errors.CalmError(
        f"{target}, where a copy of the autoencoder would lie, is a workdir of its own: give "
        "another --workdir"
      )
    if path.exists():  # Left by a start that was cut short.
      path.rmtree()

  distributed.on_first("clear", clear)
  tokenizer = epath.Path(source) / trained.origin.tokenizer_file
  write_weights(target, trained.run, trained.origin, trained.params, trained.step, tokenizer)
