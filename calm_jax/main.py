"""The act of training: `python -m calm_jax.main --config=configs/STAGE.py:SIZE --workdir=W`.

Run again with the same flags, it goes on from the newest good checkpoint.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from calm_jax import cli, config, errors, workdir
from calm_jax.data import store as store_lib
from calm_jax.models import flops
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.training import (
  autoencoder_stage,
  calm_stage,
  checkpoint,
  evaluation,
  optimizer,
  program,
  stages,
  train,
  transformer_stage,
)

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Settings: configs/STAGE.py, with :SIZE where the file has sizes.",
  lock_config=True,
)  # fmt: skip
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of this run: checkpoints, metrics, the resolved config."
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
  "allow_config_change", False, "Go on in a workdir whose stored config differs."
)


@dataclasses.dataclass(frozen=True)
class Built:
  """A run made ready over its data, nothing written yet.

  Attributes:
    codec: the sizes of the autoencoder, if there is one.
    initial: parameters to start from in place of the stage's own initial values.
    copy: writes what a new workdir holds besides its own config and checkpoints.
  """

  stage: stages.Stage
  origin: workdir.Origin
  codec: config.Autoencoder | None
  initial: Any = None
  copy: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Given:
  """What a run is built from besides its settings.

  Attributes:
    source: what `start_from` holds, where the run has no checkpoint of its own yet.
    begun: the workdir's own origin, where it was started before.
  """

  store: store_lib.TokenStore
  directory: str
  source: workdir.Trained | None
  begun: workdir.Origin | None

  @classmethod
  def of(cls, run: config.Run, store: store_lib.TokenStore, directory: str) -> "Given":
    """Raises CalmError for a `start_from` that `run` can't start from."""
    begun = workdir.read_origin(directory) if workdir.exists(directory) else None
    if not run.start_from or (begun and workdir.has_checkpoint(directory)):
      return cls(store, directory, None, begun)
    source = workdir.load(run.start_from, run.stage)
    workdir.require_same_tokenizer(source.origin, store, run.start_from)
    differing = config.differences(source.run, run)
    wrong = {name: there for name, (there, _) in differing.items() if config.shapes(name, run)}
    config.require(
      not wrong,
      f"the weights in {run.start_from} are of another size: give "
      + " ".join(f"--config.{name}={there}" for name, there in wrong.items()),
    )
    return cls(store, directory, source, begun)

  @property
  def initial(self) -> Any:
    """The weights to start from, or None."""
    return self.source.params if self.source else None

  def vocab_size(self, otherwise: int) -> int:
    """Of the model: that of the weights it goes on from, which may have been padded."""
    before = self.begun or (self.source and self.source.origin)
    return before.vocab_size if before else otherwise


def _autoencoder(run: config.AutoencoderRun, given: Given) -> Built:
  vocab_size = given.vocab_size(given.store.manifest.tokenizer.vocab_size)
  replacement = run.loss.drop_token_id
  config.require(
    0 <= replacement < vocab_size,
    f"config.loss.drop_token_id must lie in [0, {vocab_size}), the vocabulary, got {replacement}",
  )
  origin = workdir.Origin.of(given.store, run.model.patch_size, vocab_size)
  return Built(autoencoder_stage.build(run, vocab_size), origin, run.model, given.initial)


def _calm(run: config.CalmRun, given: Given) -> Built:
  own = str(epath.Path(given.directory) / workdir.AUTOENCODER)
  config.require(
    not (run.start_from and run.autoencoder),
    f"config.autoencoder is {run.autoencoder!r} beside config.start_from, whose own autoencoder "
    "is taken: leave it out",
  )
  source = run.autoencoder
  if given.begun:
    source = own
  elif given.source:
    source = str(epath.Path(run.start_from) / workdir.AUTOENCODER)
  config.require(
    bool(source),
    "config.autoencoder is empty: give --config.autoencoder=W, the workdir of stage one",
  )
  codec = workdir.load_autoencoder(source)
  workdir.require_same_tokenizer(codec.origin, given.store, source)
  vocab_size = given.vocab_size(codec.origin.vocab_size)
  origin = workdir.Origin.of(
    given.store, codec.run.model.patch_size, vocab_size, checkpoint.fingerprint(codec.params)
  )
  module = codec.module(run.training.compute_dtype)
  return Built(
    calm_stage.build(run, module, codec.params, vocab_size),
    origin,
    codec.run.model,
    given.initial,
    lambda: workdir.copy_autoencoder(codec, source, own),
  )


def _transformer(run: config.TransformerRun, given: Given) -> Built:
  vocab_size = given.vocab_size(given.store.manifest.tokenizer.vocab_size)
  origin = workdir.Origin.of(given.store, 1, vocab_size)
  return Built(transformer_stage.build(run, vocab_size), origin, None, given.initial)


BUILDERS: dict[str, Callable[..., Built]] = {
  "autoencoder": _autoencoder,
  "calm": _calm,
  "transformer": _transformer,
}


def _require_fitting(run: config.Run, patch_size: int) -> None:
  evaluation.require_context(run.data.context, patch_size, "config.data.context")
  optimizer.schedule(run.optimizer, run.training.steps)
  program.require_divisible(run, run.data.context // patch_size, mesh_lib.current())


def _require_same_config(run: config.Run, directory: str, allow_change: bool) -> None:
  """Raises CalmError where `run` may not go on in a workdir that has begun."""
  differing = {
    name: values
    for name, values in config.differences(workdir.read_run(directory), run).items()
    if name.partition(".")[0] not in config.FREE
  }
  fixed = [name for name in differing if name.partition(".")[0] in config.FIXED]
  if not differing or (allow_change and not fixed):
    return
  told = "; ".join(f"{name}: {before!r}, {now!r}" for name, (before, now) in differing.items())
  ways = "a new --workdir or the stored settings"
  raise errors.CalmError(
    f"{directory} was started with another config (stored, given): {told}. Give {ways}"
    + ("" if fixed else ", or --allow_config_change")
  )


def train_run(run: config.Run, directory: str, allow_config_change: bool = False) -> None:
  """Trains `run` in a workdir, new or to be continued.

  Raises:
    CalmError: for settings, data or a workdir that don't fit each other; nothing
      is written then.
    Interrupted: after Ctrl-C or SIGTERM, once the state is saved.
  """
  with jax.set_mesh(mesh_lib.build(run.mesh)):
    _train_on_mesh(run, directory, allow_config_change)


def _train_on_mesh(run: config.Run, directory: str, allow_config_change: bool) -> None:
  begun = workdir.exists(directory)
  if begun:
    workdir.require_trainable(directory)
    _require_same_config(run, directory, allow_config_change)
  config.require(
    bool(run.data.path),
    "config.data.path is empty: give --config.data.path=DIR, written by calm_jax.prepare",
  )
  store = store_lib.TokenStore.open(run.data.path)
  built = BUILDERS[run.stage](run, Given.of(run, store, directory))
  _require_fitting(run, built.codec.patch_size if built.codec else 1)
  if begun:
    workdir.require_same_data(directory, built.origin)
  per_token = flops.train_per_token(run, built.codec, built.origin.vocab_size)
  record = {"config": dataclasses.asdict(run), "origin": dataclasses.asdict(built.origin)}
  trainer = train.Trainer(run, built.stage, store, directory, per_token, record, built.initial)
  built = dataclasses.replace(built, initial=None)  # Held by the trainer alone, until it begins.
  if not begun:
    built.copy()
  tokenizer = epath.Path(run.data.path) / store.manifest.tokenizer.file
  workdir.create(directory, run, built.origin, tokenizer)
  trainer.train()


def main() -> None:
  if _CONFIG.value is None or not _WORKDIR.value:
    raise errors.CalmError("give --config=configs/STAGE.py[:SIZE] and --workdir=DIR")
  try:
    values = _CONFIG.value.to_dict()
  except OSError as error:  # What went wrong when the flag was parsed shows here.
    reason = " ".join(str(error).partition("Attempted")[2].split())
    raise errors.CalmError(f"can't load --config: {reason}") from error
  run = config.from_mapping(values)
  train_run(run, _WORKDIR.value, _ALLOW_CONFIG_CHANGE.value)


if __name__ == "__main__":
  cli.run(main)
