"""Settings for people: what each one means, and which are near a name that is none.

The dataclasses of `config` are the one list: meanings are the Attributes of their docstrings.
"""

import dataclasses
import difflib
import inspect
import pathlib
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections.config_flags import config_flags

from calm_jax import config, errors, files

WIDTH = 100
CONFIGS = pathlib.Path("configs")
# Likeness, in [0, 1], below which a name is not named, and how far below the best one.
LEAST, SLACK = 0.7, 0.1


class Setting(NamedTuple):
  """A setting: `data.context`, what it means, and what it may be where that is a list."""

  name: str
  meaning: str
  choices: tuple[str, ...]


class Section(NamedTuple):
  """Settings that belong together: `data`, or "" for those of the run itself."""

  name: str
  meaning: str
  settings: tuple[Setting, ...]


def _parts(cls: type) -> tuple[str, str]:
  """Returns a docstring's text before its Attributes, in one line, and these."""
  before, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
  return " ".join(before.split()), attributes


def meanings(cls: type) -> dict[str, str]:
  """Returns what each field of a dataclass means, those it inherits included."""
  found = {}
  for base in reversed(cls.__mro__):
    entry = re.compile(r"^  (\w+(?:, \w+)*): (.*(?:\n {4,}.*)*)", re.MULTILINE)
    for names, text in entry.findall(_parts(base)[1]) if base is not object else ():
      found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
  return found


def sections(cls: type, name: str = "") -> Iterator[Section]:
  """Yields the settings of a kind of run, its own first."""
  hints, known, own, inner = typing.get_type_hints(cls), meanings(cls), [], []
  for field in dataclasses.fields(cls):
    hint, path = hints[field.name], f"{name}.{field.name}".lstrip(".")
    if dataclasses.is_dataclass(hint):
      inner.append((typing.cast(type, hint), path))
      continue
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    own.append(Setting(path, known.get(field.name, ""), choices))
  yield Section(name, _parts(cls)[0], tuple(own))
  for kind, path in inner:
    yield from sections(kind, path)


def listed(values: Mapping[str, Any], flag: str, file: str) -> str:
  """Returns the settings of a config file as flags, with their values there and meanings.

  Args:
    flag: that takes the file, as `config`.

  Raises:
    CalmError: where the values are no settings of a stage.
  """
  run = config.from_mapping(values)
  there, lines = config.flat(dataclasses.asdict(run)), []
  for section in sections(type(run)):
    if not section.name:
      told = f"settings of {file}, with their values there. {section.meaning}"
    else:
      told = f"\n--{flag}.{section.name}: {section.meaning}"
    lines += textwrap.wrap(told, WIDTH, replace_whitespace=False)
    for one in section.settings:
      lines.append(f"  --{flag}.{one.name}={there[one.name]}")
      told = one.meaning + (f" One of {', '.join(one.choices)}." if one.choices[1:] else "")
      indent = " " * 6
      lines += textwrap.wrap(told, WIDTH, initial_indent=indent, subsequent_indent=indent)
  return "\n".join(lines)


def load(flag: str, file: str) -> Mapping[str, Any]:
  """Returns the settings of a config file, as --config=FILE[:SIZE] names it.

  Raises:
    CalmError: where it can't be loaded; whatever its code raised is in the message.
  """
  files.require_regular(file.partition(":")[0])
  try:
    found: Any = config_flags.ConfigFileFlagParser(flag).parse(file)
    config.require(found is not None, "its get_config returns nothing")
    return found.to_dict()
  except Exception as error:
    raise errors.CalmError(unloadable(flag, file, error)) from error


def unloadable(flag: str, file: str, error: Exception) -> str:
  """Returns in one line why a config file can't be loaded."""
  path = pathlib.Path(file.partition(":")[0])
  if not path.is_file():
    folder = path.parent if path.parent.is_dir() and path.parent != pathlib.Path() else CONFIGS
    there = sorted(str(other) for other in folder.glob("*.py"))
    near = difflib.get_close_matches(str(path), there, n=1, cutoff=0.4)
    known = f"nearest: {near[0]}" if near else "give configs/STAGE.py[:SIZE]"
    return f"--{flag}={file}: no such file; {known}"
  raised = error.__cause__ or error
  if str(error).startswith("Error whilst parsing"):  # Its text is that of a traceback.
    raised = error.__context__ or error
  kind = "" if isinstance(raised, errors.CalmError) else f"{type(raised).__name__}: "
  return f"can't load --{flag}={file}: {kind}{' '.join(str(raised).split())}"


def likeness(given: str, known: str) -> float:
  """Returns in [0, 1] how like a name is to one that is known, or short for it."""
  words, theirs = given.split("_"), known.split("_")
  if len(theirs) > 1 and given == "".join(word[0] for word in theirs):  # lr
    return 0.9
  if set(words) <= set(theirs) or set(theirs) <= set(words):  # warmup, batch_size
    return 1.0 if given == known else 0.85
  swapped = 0.85 if sorted(given) == sorted(known) else 0.0  # Letters that changed places.
  return max(swapped, difflib.SequenceMatcher(None, given, known).ratio())


def nearest(given: str, known: Iterable[str]) -> list[str]:
  """Returns the names most like one that is unknown, at most three, the likest first.

  Names may have dots: the last part counts, and settles who is named, the section before it
  who comes first.
  """
  section, _, last = given.lower().rpartition(".")
  scores = {}
  for name in known:
    its_section, _, its_last = name.rpartition(".")
    like = likeness(last, its_last)
    if like >= LEAST:
      near = difflib.SequenceMatcher(None, section, its_section).ratio() if section else 0.0
      scores[name] = like + SLACK * near
  best = max(scores.values(), default=0.0)
  ordered = sorted(scores, key=lambda name: -scores[name])
  return [name for name in ordered if scores[name] >= best - SLACK][:3]


def unknown(name: str, values: Mapping[str, Any], flag: str) -> str:
  """Returns, of a setting that a config file does not have, which are near."""
  known = config.flat(values)
  above = [other for other in known if name.startswith(f"{other}.")]
  near = above or nearest(name, known)
  if near:
    return f"no such setting; nearest: {', '.join(f'--{flag}.{other}' for other in near)}"
  section = name.rpartition(".")[0]
  if isinstance(values.get(section), Mapping):
    return f"no such setting; --{flag}.{section} has {', '.join(values[section])}"
  return f"no such setting; with --help beside --{flag} all are listed"
