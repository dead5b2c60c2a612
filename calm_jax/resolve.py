"""Mappings -> frozen settings, and the differences between two runs' settings."""

import dataclasses
import hashlib
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import ml_collections

from calm_jax import config, errors, files


def _nearest_to(value: Any, names: Iterable[str]) -> str:
  """Returns `config.nearest`, for a value of any type."""
  return config.nearest(value if isinstance(value, str) else "", names)


def choose(sizes: Mapping[str, Any], size: str) -> Any:
  """Returns the entry of a config file's size, the part after its colon.

  Raises:
    CalmError: for a size that the file does not have.
  """
  if size not in sizes:
    raise errors.CalmError(f"unknown size {size!r}: {config.nearest(size, sizes)}")
  return sizes[size]


def run_from(values: Mapping[str, Any], kinds: Mapping[str, type[config.Run]]) -> Any:
  """Returns the frozen run that a config file or a stored config.json describes.

  Args:
    kinds: stage -> class of its settings.

  Raises:
    CalmError: for an unknown name (the message suggests the nearest known one), a value of the
      wrong type or a value out of range.
  """
  stage = values.get("stage", "")
  if not isinstance(stage, str) or stage not in kinds:
    raise errors.CalmError(f"config.stage is {config.shown(stage)}: {_nearest_to(stage, kinds)}")
  run = _build(kinds[stage], values, "config")
  tokens = run.training.batch * run.data.context
  config.require(
    tokens <= config.LARGEST_INT,
    f"config.training.batch * config.data.context must lie in [1, {config.LARGEST_INT}], the "
    f"tokens of a step, got {tokens}",
  )
  return run


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
  """Returns an instance of a settings class; `where` is its dotted name in errors."""
  fields = {field.name: field for field in dataclasses.fields(cls)}
  hints = typing.get_type_hints(cls)
  arguments = {}
  for name, value in values.items():
    if name not in fields:
      raise errors.CalmError(f"unknown setting {where}.{name}: {config.nearest(name, fields)}")
    path = f"{where}.{name}"
    if dataclasses.is_dataclass(hints[name]):
      message = f"{path} must hold settings, got {config.shown(value)}"
      config.require(isinstance(value, Mapping), message)
      arguments[name] = _build(typing.cast(type, hints[name]), value, path)
    else:
      arguments[name] = _checked(hints[name], value, path)
  try:
    return cls(**arguments)
  except errors.CalmError as error:
    raise errors.CalmError(f"{where}.{error}") from None


def _checked(hint: Any, value: Any, where: str) -> Any:
  """Returns a setting's value, converted to its type; CalmError if it can't be."""
  require, shown = config.require, config.shown(value)
  if typing.get_origin(hint) is Literal:
    choices = typing.get_args(hint)
    require(value in choices, f"{where} is {shown}: {_nearest_to(value, choices)}")
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value) if abs(value) < config.FLOATS[1] else math.inf
  require(
    isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
    f"{where} must be of type {hint.__name__}, got {shown}",
  )
  require(not (hint is float and not math.isfinite(value)), f"{where} must be finite, got {value}")
  require(
    not isinstance(value, str) or (config.is_text(value) and "\0" not in value),
    f"{where} holds characters that no file name can have, got {value!a}",
  )
  return value


def ordered(kind: type[config.Run]) -> list[str]:
  """Returns the names of a stage's settings in the order in which people read them.

  A stage's own settings come before those that every stage has, after what it is and reads.
  """
  shared = [field.name for field in dataclasses.fields(config.Run)]
  own = [field.name for field in dataclasses.fields(kind) if field.name not in shared]
  hints = typing.get_type_hints(kind)
  groups = [name for name in own if dataclasses.is_dataclass(hints[name])]
  values = [name for name in own if name not in groups]
  first = shared.index("start_from")
  return [*shared[:first], *values, "start_from", *groups, *shared[first + 1 :]]


def values(run: config.Run) -> dict[str, Any]:
  """Returns a run's settings as nested mappings, in the order of `ordered`."""
  nested = dataclasses.asdict(run)
  return {name: nested[name] for name in ordered(type(run))}


def to_config_dict(run: config.Run) -> ml_collections.ConfigDict:
  """Returns `run` as the ConfigDict that a config file hands to the flags."""
  return ml_collections.ConfigDict(values(run))


def to_json(run: config.Run) -> str:
  """Returns `run` as indented JSON, the form in which it is stored."""
  return files.to_json(values(run))


def digest(run: config.Run) -> str:
  """Returns 8 hex digits that identify the settings of a run."""
  return hashlib.sha256(to_json(run).encode()).hexdigest()[:8]


# Settings that a started run may change freely, since they don't change its numbers; and those
# that it may change with --allow_config_change. All others shape its parameters and are fixed.
FREE = ("mesh", "execution", "limits", "profile")
CHANGEABLE = ("data", "loss", "optimizer", "training")
# Of these, settings that leave parameters out when they are 0.
SWITCHES = ("loss.token_weight",)


def is_fixed(name: str) -> bool:
  """Returns whether a started run can't change a setting."""
  return name.partition(".")[0] not in (*FREE, *CHANGEABLE)


def is_switched(name: str, before: Any, now: Any) -> bool:
  """Returns whether a change of a setting adds or removes parameters."""
  return name in SWITCHES and (before == 0) != (now == 0)


def differences(a: config.Run, b: config.Run) -> dict[str, tuple[Any, Any]]:
  """Returns the settings in which two runs differ, with both values."""
  flat_a, flat_b = flat(dataclasses.asdict(a)), flat(dataclasses.asdict(b))
  names = [*flat_a, *(name for name in flat_b if name not in flat_a)]
  return {
    name: (flat_a.get(name), flat_b.get(name))
    for name in names
    if flat_a.get(name) != flat_b.get(name)
  }


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns nested settings as one dictionary with dotted names, such as training.steps."""
  result = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      result |= flat(value, f"{prefix}{name}.")
    else:
      result[f"{prefix}{name}"] = value
  return result


def at(run: config.Run, name: str) -> Any:
  """Returns the setting of a dotted name."""
  value: Any = run
  for part in name.split("."):
    value = getattr(value, part)
  return value


def changed(run: Any, name: str, value: Any) -> Any:
  """Returns `run` with the setting of a dotted name changed."""
  first, _, rest = name.partition(".")
  inner = changed(getattr(run, first), rest, value) if rest else value
  return dataclasses.replace(run, **{first: inner})
