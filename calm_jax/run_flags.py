"""Flags -> settings: --config, and for acts without a workdir its parents and vocabulary."""

import dataclasses
import runpy
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from calm_jax import cli, config, distributed, errors, files, settings
from calm_jax.running import untrained
from calm_jax.stages import table

# Attributes the flags defined here to the act that calls, so that its --help shows them.
flags.disclaim_key_flags()


class _ConfigFile(flags.ArgumentParser):
  """Parser of a config file that refuses pipes and devices, whose reading may never end."""

  def __init__(self, loader: flags.ArgumentParser):
    self._loader = loader

  def parse(self, argument: str) -> Any:
    path = settings.located(argument)
    files.require_regular(path.partition(":")[0])
    return self._loader.parse(path)


def define(
  name: str = "config",
  meaning: str = "Settings: configs/STAGE.py, with :SIZE if the file has sizes; STAGE.py alone "
  "names a file that is shipped with the package.",
) -> None:
  """Defines a flag for a config file, and flags --NAME.setting=value for its settings."""
  cli.require_flag_files()
  config_flags.DEFINE_config_file(name, None, meaning, lock_config=True)
  flag = flags.FLAGS[name]
  flag.parser = _ConfigFile(flag.parser)


def _parents() -> dict[str, str]:
  """Returns the parents of all stages: name -> stage."""
  return {name: stage for spec in table.STAGES.values() for name, stage in spec.parents.items()}


def define_sizes() -> None:
  """Defines --NAME_config for each kind of parent, such as the autoencoder, and --vocab_size.

  For acts without a workdir, which would hold these sizes.
  """
  for name in _parents():
    define(
      f"{name}_config",
      f"Sizes of the {name}, for a stage that is trained on one; by default those that go with "
      "--config's size.",
    )
  flags.DEFINE_integer(
    "vocab_size",
    None,
    "Tokens of the vocabulary; by default those that go with --config's size: Llama 3's 128,256 "
    "for the published sizes, 1,024 for the quickstart.",
    2,
    2**31 - 1,
  )


def run(name: str = "config") -> config.Run | None:
  """Returns the settings of a flag, or None if it is not given.

  Raises:
    CalmError: if the file can't be loaded, or holds no settings of a stage.
  """
  value: Any = flags.FLAGS[name].value
  if value is None:
    return None
  try:
    values: Mapping[str, Any] = value.to_dict()
  except OSError as error:  # Errors of parsing the flag surface here.
    file = config_flags.get_config_filename(flags.FLAGS[name])
    raise errors.CalmError(settings.unloadable(name, file, error)) from error
  return table.run_from(values)


def title() -> str:
  """Returns --config as given on the command line, with the overridden settings."""
  flag = flags.FLAGS["config"]
  overrides = config_flags.get_override_values(flag)
  changes = [f"{name}={value}" for name, value in overrides.items()]
  return " ".join([config_flags.get_config_filename(flag), *changes])


def companions() -> config.Companions:
  """Returns the vocabulary and parents of --config: those given, otherwise those of its size.

  Raises:
    CalmError: if a parent's config is of another stage, or does not fit the run.
  """
  file = settings.located(config_flags.get_config_filename(flags.FLAGS["config"]))
  path, *size = file.split(":", 1)
  defaults = runpy.run_path(path).get("get_companions", lambda *size: config.Companions())(*size)
  chosen, labels, child = dict(defaults.parents), {}, run()
  for name, stage in _parents().items():
    flag, override = f"--{name}_config", run(f"{name}_config")
    if override is not None:
      if override.stage != stage:
        raise errors.CalmError(
          f"{flag} is of stage {override.stage!r}: give {table.STAGES[stage].title}'s"
        )
      chosen[name] = override
    labels[name] = (f"the {name} of {flag if override is not None else 'this size'}", flag)
  result = config.Companions(flags.FLAGS.vocab_size or defaults.vocab_size, chosen)
  if child is not None:
    table.of(child).check(child, parents(child, result), result.vocab_size, labels)
  return result


def parents(child: Any, used: config.Companions) -> dict[str, Any]:
  """Returns the settings of all parents of a run."""
  return untrained.parent_runs(child, used.parents)


def counted_with(child: config.Run, used: config.Companions) -> str:
  """Returns a line that states the vocabulary and the parents that costs are counted with."""
  line = f"vocabulary {used.vocab_size:,} (--vocab_size)"
  for name, parent in parents(child, used).items():
    line += f"; {name} of {table.of(parent).presentation.brief(parent)} (--{name}_config)"
  return line


def define_processes() -> None:
  """Defines the flags by which the processes of one job find each other."""
  flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0; detected on TPU pods and Slurm."
  )
  flags.DEFINE_string(
    "coordinator_bind_address", None, "HOST:PORT that process 0 listens on, if it differs."
  )
  flags.DEFINE_integer("num_processes", None, "Number of processes of the job.", 1)
  flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", 0)
  flags.DEFINE_list(
    "local_device_ids", None, "Devices of this machine that this process uses; by default all."
  )
  flags.DEFINE_string(
    "cluster_detection_method",
    None,
    "How the coordinator and the processes are detected; see jax.distributed.initialize.",
  )
  default = distributed.Processes()
  for name, least, meaning in (
    ("initialization_timeout", 1, "Seconds to wait for all processes to join."),
    ("heartbeat_timeout", 6, "Seconds without a heartbeat after which a process counts as lost."),
    ("shutdown_timeout", 1, "Seconds that a process waits for the others at the end."),
    ("expected_processes", 0, "Refuse to run with another number of processes; 0 for any number."),
  ):
    flags.DEFINE_integer(name, getattr(default, name), meaning, least)


def processes() -> distributed.Processes:
  """Returns the values of the flags of `define_processes`."""
  names = [field.name for field in dataclasses.fields(distributed.Processes)]
  values = {name: flags.FLAGS[name].value for name in names}
  devices = values["local_device_ids"]
  return distributed.Processes(
    **{**values, "local_device_ids": devices and [int(device) for device in devices]}
  )
