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

# Builds (stage, origin, autoencoder sizes) of a run over its data.
Built = tuple[stages.Stage, workdir.Origin, config.Autoencoder]
Builder = Callable[..., Built]


def _autoencoder(run: config.AutoencoderRun, store: store_lib.TokenStore, directory: str) -> Built:
  stage = stages.autoencoder_stage(run, store.manifest.tokenizer.vocab_size)
  return stage, workdir.Origin.of(store, run.model.patch_size), run.model


def _calm(run: config.CalmRun, store: store_lib.TokenStore, directory: str) -> Built:
  own = str(epath.Path(directory) / workdir.AUTOENCODER)
  if not workdir.exists(own):
    if not run.autoencoder:
      raise errors.CalmError(
        "config.autoencoder is empty: give --config.autoencoder=W, the workdir of stage one"
      )
    trained = workdir.load_autoencoder(run.autoencoder)
    workdir.require_same_tokenizer(trained.origin, store, run.autoencoder)
    workdir.copy_autoencoder(trained, run.autoencoder, directory)
  trained = workdir.load_autoencoder(own)
  workdir.require_same_tokenizer(trained.origin, store, own)
  codec = trained.module(run.training.compute_dtype)
  origin = workdir.Origin.of(
    store, trained.run.model.patch_size, checkpoint.fingerprint(trained.params)
  )
  return stages.calm_stage(run, codec, trained.params), origin, trained.run.model


BUILDERS: dict[str, Builder] = {"autoencoder": _autoencoder, "calm": _calm}


def _require_fitting(run: config.Run, patch_size: int) -> None:
  context = run.data.context
  if context % patch_size or context < 2 * patch_size:
    raise errors.CalmError(
      f"config.data.context must be a multiple of K = {patch_size} tokens and at least two "
      f"patches, got {context}"
    )
  optimizer.schedule(run.optimizer, run.training.steps)


def train_run(run: config.Run, directory: str, allow_config_change: bool = False) -> None:
  """Trains `run` in a workdir, new or to be continued.

  Raises:
    CalmError: for settings, data or a workdir that don't fit each other.
    Interrupted: after Ctrl-C or SIGTERM, once the state is saved.
  """
  if workdir.exists(directory):
    differing = config.differences(workdir.read_run(directory), run)
    if differing and not allow_config_change:
      raise errors.CalmError(
        f"{directory} was started with another config (stored, given): {'; '.join(differing)}. "
        "Give a new --workdir, the stored settings, or --allow_config_change"
      )
  if not run.data.path:
    raise errors.CalmError(
      "config.data.path is empty: give --config.data.path=DIR, written by calm_jax.prepare"
    )
  store = store_lib.TokenStore.open(run.data.path)
  stage, origin, codec = BUILDERS[run.stage](run, store, directory)
  _require_fitting(run, codec.patch_size)
  if workdir.exists(directory):
    workdir.require_same_data(directory, origin)
  per_token = flops.train_per_token(run, codec, origin.vocab_size)
  record = {"config": dataclasses.asdict(run), "origin": dataclasses.asdict(origin)}
  trainer = train.Trainer(run, stage, store, directory, per_token, record)
  workdir.create(directory, run, origin, epath.Path(run.data.path) / store.manifest.tokenizer.file)
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
