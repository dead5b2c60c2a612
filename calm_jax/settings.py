"""Dataclasses of `config` -> help: the meaning of each setting, and errors of config files.

The docstrings of the dataclasses are the one source: a setting's meaning is its entry under
Attributes.
"""

import dataclasses
import difflib
import inspect
import os
import pathlib
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections.config_flags import config_flags

from calm_jax import config, errors, files, resolve, spelling

WIDTH = 100
# Folders of the shipped config files: in the wheel, and in a checkout.
_PACKAGE = pathlib.Path(__file__).parent
_SHIPPED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


class Setting(NamedTuple):
  """A setting.

  Attributes:
    name: its dotted name, such as `data.context`.
    meaning: what it means.
    choices: its allowed values, () if they are not a list.
  """

  name: str
  meaning: str
  choices: tuple[str, ...]


class Section(NamedTuple):
  """A group of settings, such as `data`; the name "" is the run itself."""

  name: str
  meaning: str
  settings: tuple[Setting, ...]


def _parts(cls: type) -> tuple[str, str]:
  """Returns a docstring's text before its Attributes, in one line, and the Attributes."""
  before, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
  return " ".join(before.split()), attributes


def meanings(cls: type) -> dict[str, str]:
  """Returns the meaning of each field of a dataclass, inherited fields included."""
  result = {}
  for base in reversed(cls.__mro__):
    entry = re.compile(r"^  (\w+(?:, \w+)*): (.*(?:\n {4,}.*)*)", re.MULTILINE)
    for names, text in entry.findall(_parts(base)[1]) if base is not object else ():
      result |= dict.fromkeys(names.split(", "), " ".join(text.split()))
  return result


def sections(cls: type, name: str = "") -> Iterator[Section]:
  """Yields the sections of a kind of run; the run's own settings come first."""
  hints, meaning_of, own, inner = typing.get_type_hints(cls), meanings(cls), [], []
  fields = [field.name for field in dataclasses.fields(cls)]
  for field in resolve.ordered(cls) if issubclass(cls, config.Run) else fields:
    hint, path = hints[field], f"{name}.{field}".lstrip(".")
    if dataclasses.is_dataclass(hint):
      inner.append((typing.cast(type, hint), path))
      continue
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    own.append(Setting(path, meaning_of.get(field, ""), choices))
  yield Section(name, _parts(cls)[0], tuple(own))
  for kind, path in inner:
    yield from sections(kind, path)


def listed(values: Mapping[str, Any], flag: str, file: str) -> str:
  """Returns the settings of a config file as flags, with their values and meanings.

  Args:
    values: the settings.
    flag: the flag that takes the file, such as `config`.
    file: the file's path, as given.

  Raises:
    CalmError: if the values are not the settings of a stage.
  """
  from calm_jax.stages import table  # Imported here because acts without settings need no JAX.

  run = table.run_from(values)
  value_of, lines = resolve.flat(dataclasses.asdict(run)), []
  for section in sections(type(run)):
    if not section.name:
      heading = f"settings of {file} and their values. {section.meaning}"
    else:
      heading = f"\n--{flag}.{section.name}: {section.meaning}"
    lines += textwrap.wrap(heading, WIDTH, replace_whitespace=False)
    for setting in section.settings:
      lines.append(f"  --{flag}.{setting.name}={value_of[setting.name]}")
      choices = f" One of {', '.join(setting.choices)}." if setting.choices[1:] else ""
      indent = " " * 6
      meaning = setting.meaning + choices
      lines += textwrap.wrap(meaning, WIDTH, initial_indent=indent, subsequent_indent=indent)
  return "\n".join(lines)


def shipped() -> dict[str, pathlib.Path]:
  """Returns the config files that come with the package, by name: `calm.py`."""
  folder = next((folder for folder in _SHIPPED if folder.is_dir()), None)
  return {path.name: path for path in sorted(folder.glob("*.py"))} if folder else {}


def located(file: str) -> str:
  """Returns FILE[:SIZE] with FILE as a path; the name of a shipped file becomes its path."""
  path, colon, size = file.partition(":")
  if not os.path.lexists(path):
    path = str(shipped().get(path, path))
  return f"{path}{colon}{size}"


def load(flag: str, file: str) -> Mapping[str, Any]:
  """Returns the settings of a config file.

  Args:
    flag: the flag that takes the file, such as `config`.
    file: FILE[:SIZE].

  Raises:
    CalmError: if the file can't be loaded; the message has what its code raised.
  """
  place = located(file)
  files.require_regular(place.partition(":")[0])
  try:
    loaded: Any = config_flags.ConfigFileFlagParser(flag).parse(place)
    config.require(loaded is not None, "its get_config returns nothing")
    return loaded.to_dict()
  except Exception as error:
    raise errors.CalmError(unloadable(flag, file, error)) from error


def unloadable(flag: str, file: str, error: Exception) -> str:
  """Returns one line that says why a config file can't be loaded."""
  path = pathlib.Path(located(file).partition(":")[0])
  if not path.is_file():
    return f"--{flag}={file}: no such file; {_near_file(path)}"
  raised = error.__cause__ or error
  if str(error).startswith("Error whilst parsing"):  # The message is a traceback.
    raised = error.__context__ or error
  kind = "" if isinstance(raised, errors.CalmError) else f"{type(raised).__name__}: "
  return f"can't load --{flag}={file}: {kind}{' '.join(str(raised).split())}"


def _near_file(path: pathlib.Path) -> str:
  """Returns the config file nearest to a missing path: in its folder, else among those shipped."""
  neighbors = (
    [str(file) for file in path.parent.glob("*.py")] if path.parent != pathlib.Path() else []
  )
  if near := difflib.get_close_matches(str(path), sorted(neighbors), n=1, cutoff=0.4):
    return f"nearest: {near[0]}"
  near = difflib.get_close_matches(path.name, shipped(), n=1, cutoff=0.4)
  return f"{f'nearest: {near[0]}; ' if near else ''}shipped are {', '.join(shipped())}"


def unknown(name: str, values: Mapping[str, Any], flag: str) -> str:
  """Returns an error message for a setting that a config file does not have.

  Args:
    name: the dotted name of the unknown setting.
    values: the settings of the config file.
    flag: the flag that takes the file, such as `config`.
  """
  names = resolve.flat(values)
  parents = [setting for setting in names if name.startswith(f"{setting}.")]
  near = parents or spelling.similar(name, names)
  if near:
    return f"no such setting; nearest: {', '.join(f'--{flag}.{setting}' for setting in near)}"
  section = name.rpartition(".")[0]
  if isinstance(values.get(section), Mapping):
    return f"no such setting; --{flag}.{section} has {', '.join(values[section])}"
  return f"no such setting; add --help after --{flag} to list all"
