"""The act of training: `python -m calm_jax.main --config=configs/STAGE.py:SIZE --workdir=W`.

Run again with the same flags, it goes on from the newest good checkpoint.
"""

import dataclasses
from collections.abc import Callable

from absl import flags
from etils import epath
from ml_collections import config_flags

from calm_jax import cli, config, errors, workdir
from calm_jax.data import store as store_lib
from calm_jax.models import flops
from calm_jax.training import checkpoint, optimizer, stages, train

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
    codec: the sizes of the autoencoder.
    copy: writes what a new workdir holds besides its own config and checkpoints.
  """

  stage: stages.Stage
  origin: workdir.Origin
  codec: config.Autoencoder
  copy: Callable[[], None]


def _autoencoder(run: config.AutoencoderRun, store: store_lib.TokenStore, directory: str) -> Built:
  vocab_size, replacement = store.manifest.tokenizer.vocab_size, run.loss.drop_token_id
  config.require(
    0 <= replacement < vocab_size,
    f"config.loss.drop_token_id must lie in [0, {vocab_size}), the vocabulary, got {replacement}",
  )
  origin = workdir.Origin.of(store, run.model.patch_size)
  return Built(stages.autoencoder_stage(run, vocab_size), origin, run.model, lambda: None)


def _calm(run: config.CalmRun, store: store_lib.TokenStore, directory: str) -> Built:
  own = str(epath.Path(directory) / workdir.AUTOENCODER)
  source = own if workdir.exists(directory) else run.autoencoder
  config.require(
    bool(source),
    "config.autoencoder is empty: give --config.autoencoder=W, the workdir of stage one",
  )
  trained = workdir.load_autoencoder(source)
  workdir.require_same_tokenizer(trained.origin, store, source)
  origin = workdir.Origin.of(
    store, trained.run.model.patch_size, checkpoint.fingerprint(trained.params)
  )
  return Built(
    stages.calm_stage(run, trained.module(run.training.compute_dtype), trained.params),
    origin,
    trained.run.model,
    lambda: workdir.copy_autoencoder(trained, source, own),
  )


BUILDERS: dict[str, Callable[..., Built]] = {"autoencoder": _autoencoder, "calm": _calm}


def _require_fitting(run: config.Run, patch_size: int) -> None:
  context = run.data.context
  config.require(
    context % patch_size == 0 and context >= 2 * patch_size,
    f"config.data.context must be a multiple of K = {patch_size} tokens and at least two "
    f"patches, got {context}",
  )
  optimizer.schedule(run.optimizer, run.training.steps)


def _require_same_config(run: config.Run, directory: str, allow_change: bool) -> None:
  """Raises CalmError where `run` may not go on in a workdir that has begun."""
  differing = config.differences(workdir.read_run(directory), run)
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
  begun = workdir.exists(directory)
  if begun:
    _require_same_config(run, directory, allow_config_change)
  config.require(
    bool(run.data.path),
    "config.data.path is empty: give --config.data.path=DIR, written by calm_jax.prepare",
  )
  store = store_lib.TokenStore.open(run.data.path)
  built = BUILDERS[run.stage](run, store, directory)
  _require_fitting(run, built.codec.patch_size)
  if begun:
    workdir.require_same_data(directory, built.origin)
  per_token = flops.train_per_token(run, built.codec, built.origin.vocab_size)
  record = {"config": dataclasses.asdict(run), "origin": dataclasses.asdict(built.origin)}
  trainer = train.Trainer(run, built.stage, store, directory, per_token, record)
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
