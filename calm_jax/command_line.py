"""The words of a command line -> what its reader is told: help, or why they are refused."""

import ast
import contextlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import app, flags
from ml_collections.config_flags import config_flags

from calm_jax import config, errors, settings

_HELP = ("help", "helpshort", "helpfull", "?")
_PARSERS: dict[type, flags.ArgumentParser] = {
  bool: flags.BooleanParser(), int: flags.IntegerParser(), float: flags.FloatParser(),
}  # fmt: skip


class _Word(NamedTuple):
  """A flag as it was given: `--name=value` or `--name value`, None where no value is there."""

  name: str
  value: str | None


def _words(argv: Sequence[str]) -> Iterator[_Word]:
  """Yields the flags of a command line, known or not, up to the first word that is none."""
  words = flags.FLAGS.read_flags_from_files(list(argv[1:]), force_gnu=False)
  place = 0
  while place < len(words):
    name, given, value = words[place].lstrip("-").partition("=")
    place += 1
    if not words[place - 1].startswith("-") or not name:
      return
    if not given and place < len(words) and name not in _HELP:
      known, setting = _flag(name), bool(_config_of(name)) and not words[place].startswith("--")
      if setting if known is None else not known.boolean:
        given, value, place = "=", words[place], place + 1
    yield _Word(name, value if given else None)


def _flag(name: str) -> flags.Flag | None:
  """Returns a flag, None where there is none of this name."""
  if name not in flags.FLAGS:
    return None
  return flags.FLAGS[name]


def _configs() -> list[str]:
  """Returns the flags that take a config file."""
  return [name for name in flags.FLAGS if config_flags.is_config_flag(flags.FLAGS[name])]


def _config_of(name: str) -> str:
  """Returns the config flag that a flag sets a setting of, as --config.data.path; else ""."""
  first, dot, _ = name.partition(".")
  return next((flag for flag in _configs() if dot and first in (flag, f"no{flag}")), "")


def asks_for_help(argv: Sequence[str]) -> str:
  """Returns the first flag that asks for help, "" where none does."""
  try:
    return next((word.name for word in _words(argv) if word.name in _HELP), "")
  except flags.Error:  # Of a flag file, which parsing will tell.
    return ""


def helped(argv: Sequence[str], whole: bool) -> str:
  """Returns what the act does, its flags, and the settings of the config files that are given.

  Args:
    whole: with the flags of the libraries.

  Raises:
    CalmError: for a config file that can't be loaded.
  """
  text = io.StringIO()
  with contextlib.redirect_stdout(text):
    app.usage(shorthelp=not whole, writeto_stdout=True)
  parts = [text.getvalue().strip()]
  if not whole:
    parts.append("--helpfull lists the flags of the libraries too.")
  given = {word.name: word.value or "" for word in _words(argv) if word.name in _configs()}
  parts += [settings.listed(settings.load(flag, file), flag, file) for flag, file in given.items()]
  if _configs() and not given:
    parts.append(
      "Settings are flags too, as --config.training.steps=1000. Those of a config file, their "
      "values there and what they mean:\n  --config=configs/calm.py:quickstart --help"
    )
  return "\n\n".join(parts)


def reason(argv: Sequence[str], error: Exception) -> str:
  """Returns in one line why a command line was refused.

  Args:
    error: what parsing it raised.
  """
  files: dict[str, str] = {}
  with contextlib.suppress(flags.Error):
    for word in _words(argv):
      flag = _config_of(word.name)
      told = _wrong_setting(flag, word, files) if flag else _wrong_flag(word)
      if told:
        return told
      files[word.name] = word.value or ""
  required = [name for name in flags.FLAGS if _is_missing(flags.FLAGS[name])]
  if required and isinstance(error, flags.IllegalFlagValueError):
    return f"give {', '.join(f'--{name}=...' for name in required)}: --help tells what they are"
  return " ".join(str(error).split()) or type(error).__name__


def _is_missing(flag: flags.Flag) -> bool:
  return flag.value is None and any("other than None" in one.message for one in flag.validators)


def _wrong_setting(flag: str, word: _Word, files: Mapping[str, str]) -> str:
  """Returns what is wrong with a setting, "" where nothing is.

  Args:
    files: of the config flags that come before it.
  """
  shown, path = f"--{word.name}", word.name.partition(".")[2]
  if flag not in files:
    return f"{shown} is a setting of a config file: give --{flag}=FILE before it"
  try:
    values = settings.load(flag, files[flag])
  except errors.CalmError as error:
    return str(error)
  known = config.flat(values)
  if path in known:
    parser = _PARSERS.get(type(known[path]))
    return _wrong_value(shown, word.value, parser or flags.ArgumentParser())
  section: Any = values
  for part in path.split("."):
    section = section.get(part) if isinstance(section, Mapping) else None
  if section is None:
    return f"{shown}: {settings.unknown(path, values, flag)}"
  with contextlib.suppress(ValueError, SyntaxError):
    if isinstance(ast.literal_eval(word.value or ""), dict):
      return ""
  return f"{shown} holds settings: give {shown}.NAME=VALUE, where NAME is of {', '.join(section)}"


def _wrong_flag(word: _Word) -> str:
  """Returns what is wrong with a flag, "" where nothing is."""
  name = word.name
  known = _flag(name)
  if known is not None and config_flags.is_config_flag(known):
    try:
      settings.load(name, word.value or "")
    except errors.CalmError as error:
      return str(error)
    return ""
  if known is not None:
    return _wrong_value(f"--{name}", word.value, known.parser)
  positive = name.removeprefix("no")
  if positive in flags.FLAGS and flags.FLAGS[positive].boolean:
    return f"--{name} takes no value, got {word.value!r}" if word.value is not None else ""
  return f"--{name}: no such flag; {_near(name)}"


def _wrong_value(shown: str, value: str | None, parser: flags.ArgumentParser) -> str:
  """Returns what a value should be, "" where it is that."""
  if value is None:
    boolean = isinstance(parser, flags.BooleanParser)
    return "" if boolean else f"{shown} needs a value: give {shown}=VALUE"
  try:
    parser.parse(value)
  except (TypeError, ValueError) as error:
    if isinstance(parser, flags.EnumParser):
      return f"{shown} is {value!r}: {config.nearest(value, parser.enum_values)}"
    expected = "true or false" if isinstance(parser, flags.BooleanParser) else parser.syntactic_help
    if expected.startswith(("integer", "number")):
      expected = f"{'an' if expected[0] == 'i' else 'a'} {expected}"
    return f"{shown}={value} must be {expected}" if expected else f"{shown}={value}: {error}"
  return ""


def _near(name: str) -> str:
  """Returns which flags are near to a name that is none, ours before those of libraries."""
  first, dot, rest = name.partition(".")
  if dot and (near := settings.nearest(first, _configs())):
    return f"nearest: --{near[0]}.{rest}"
  modules = flags.FLAGS.flags_by_module_dict()
  ours = [
    flag.name for module, found in modules.items() for flag in found
    if module.startswith(("calm_jax", sys.argv[0]))
  ]  # fmt: skip
  for known in (ours, list(flags.FLAGS)):
    negated = [f"no{one}" for one in known if flags.FLAGS[one].boolean]
    if near := settings.nearest(name, [*known, *negated]):
      return f"nearest: {', '.join(f'--{one}' for one in near)}"
  return "--help lists all"
