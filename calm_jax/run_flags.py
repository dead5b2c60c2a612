"""Flags -> settings: --config, and for acts without a workdir what else a model's sizes take."""

from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from calm_jax import config, errors, files
from calm_jax.planning import published


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
  define("autoencoder_config", "Sizes of stage two's autoencoder; by default the published ones.")
  flags.DEFINE_integer("vocab_size", published.VOCAB, "Tokens; by default Llama 3's.", 2, 2**31 - 1)


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
    reason = " ".join(str(error).partition("Attempted")[2].split())
    raise errors.CalmError(f"can't load --{name}: {reason}") from error
  return config.from_mapping(values)


def title() -> str:
  """Returns how --config was given, changes included."""
  flag = flags.FLAGS["config"]
  changes = config_flags.get_override_values(flag)
  told = [f"{name}={value}" for name, value in changes.items()]
  return " ".join([config_flags.get_config_filename(flag), *told])


def codec() -> config.Autoencoder:
  """Returns the sizes of --autoencoder_config, else the published ones.

  Raises:
    CalmError: where it is of another stage.
  """
  given = run("autoencoder_config")
  if given is None:
    return config.Autoencoder()
  if not isinstance(given, config.AutoencoderRun):
    raise errors.CalmError(f"--autoencoder_config is of stage {given.stage!r}: give stage one's")
  return given.model


def vocab_size() -> int:
  """Returns --vocab_size."""
  return flags.FLAGS.vocab_size
