"""Flags -> settings: --config, and for acts without a workdir what else a model's sizes take."""

import runpy
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from calm_jax import config, errors, files, settings

# Flags defined here are those of the act that calls: its --help is to show them.
flags.disclaim_key_flags()


class _ConfigFile(flags.ArgumentParser):
  """A config file's parser that opens no pipe and no device, whose end might never come."""

  def __init__(self, loader: flags.ArgumentParser):
    self._loader = loader

  def parse(self, argument: str) -> Any:
    files.require_regular(argument.partition(":")[0])
    return self._loader.parse(argument)


def define(
  name: str = "config",
  meaning: str = "Settings: configs/STAGE.py, with :SIZE where the file has sizes.",
) -> None:
  """Defines a flag that takes a config file, and its settings as --NAME.setting=value."""
  config_flags.DEFINE_config_file(name, None, meaning, lock_config=True)
  flag = flags.FLAGS[name]
  flag.parser = _ConfigFile(flag.parser)


def define_sizes() -> None:
  """Defines --autoencoder_config and --vocab_size, which a workdir would tell."""
  define(
    "autoencoder_config",
    "Sizes of stage two's autoencoder; by default of the one that goes with --config's size.",
  )
  flags.DEFINE_integer(
    "vocab_size",
    None,
    "Tokens of the vocabulary; by default that which goes with --config's size: Llama 3's 128,256 "
    "for the published ones, 1,024 for the quickstart's.",
    2,
    2**31 - 1,
  )


def run(name: str = "config") -> config.Run | None:
  """Returns the settings of a flag, None where it is not given.

  Raises:
    CalmError: where the file can't be loaded, or holds no settings of a stage.
  """
  value: Any = flags.FLAGS[name].value
  if value is None:
    return None
  try:
    values: Mapping[str, Any] = value.to_dict()
  except OSError as error:  # What went wrong when the flag was parsed shows here.
    file = config_flags.get_config_filename(flags.FLAGS[name])
    raise errors.CalmError(settings.unloadable(name, file, error)) from error
  return config.from_mapping(values)


def title() -> str:
  """Returns how --config was given, changes included."""
  flag = flags.FLAGS["config"]
  changes = config_flags.get_override_values(flag)
  told = [f"{name}={value}" for name, value in changes.items()]
  return " ".join([config_flags.get_config_filename(flag), *told])


def companions() -> config.Companions:
  """Returns the vocabulary and the autoencoder of --config: those given, else its size's own.

  Raises:
    CalmError: where --autoencoder_config is of another stage, or of another K than the run.
  """
  path, *size = config_flags.get_config_filename(flags.FLAGS["config"]).split(":", 1)
  own = runpy.run_path(path).get("get_companions", lambda *size: config.Companions())(*size)
  given, ours = run("autoencoder_config"), run()
  codec = own.autoencoder
  if given is not None:
    if not isinstance(given, config.AutoencoderRun):
      raise errors.CalmError(f"--autoencoder_config is of stage {given.stage!r}: give stage one's")
    codec = given.model
  if ours is not None:
    whose = "the autoencoder of " + ("--autoencoder_config" if given else "this size")
    config.require_same_patches(ours, codec, whose, "--autoencoder_config")
  return config.Companions(flags.FLAGS.vocab_size or own.vocab_size, codec)


def counted_with(ours: config.Run, found: config.Companions) -> str:
  """Returns what of `companions` counts for these settings, for people."""
  codec, line = found.autoencoder, f"vocabulary {found.vocab_size:,} (--vocab_size)"
  if not isinstance(ours, config.CalmRun):
    return line
  return (
    f"{line}; autoencoder of K = {codec.patch_size}, width {codec.width}, latent {codec.latent} "
    "(--autoencoder_config)"
  )
