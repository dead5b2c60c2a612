"""Command line -> help text, or one line that says why the command line is refused."""

import ast
import contextlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import app, flags
from ml_collections.config_flags import config_flags

from calm_jax import config, errors, resolve, settings, spelling

_HELP = ("help", "helpshort", "helpfull", "?")
_PARSERS: dict[type, flags.ArgumentParser] = {
  bool: flags.BooleanParser(),
  int: flags.IntegerParser(),
  float: flags.FloatParser(),
}


class _Word(NamedTuple):
  """A flag on the command line: `--name=value` or `--name value`; the value may be None."""

  name: str
  value: str | None


def _words(argv: Sequence[str]) -> Iterator[_Word]:
  """Yields the flags of a command line, undefined ones too, up to the first other word."""
  words = flags.FLAGS.read_flags_from_files(list(argv[1:]), force_gnu=False)
  position = 0
  while position < len(words):
    name, equals, value = words[position].lstrip("-").partition("=")
    position += 1
    if not words[position - 1].startswith("-") or not name:
      return
    if not equals and position < len(words) and name not in _HELP:
      flag, is_setting = (
        _flag(name),
        bool(_config_of(name)) and not words[position].startswith("--"),
      )
      if is_setting if flag is None else not flag.boolean:
        equals, value, position = "=", words[position], position + 1
    yield _Word(name, value if equals else None)


def _flag(name: str) -> flags.Flag | None:
  """Returns the flag of this name, None if there is none."""
  if name not in flags.FLAGS:
    return None
  return flags.FLAGS[name]


def _configs() -> list[str]:
  """Returns the names of the flags that take a config file."""
  return [name for name in flags.FLAGS if config_flags.is_config_flag(flags.FLAGS[name])]


def _config_of(name: str) -> str:
  """Returns `config` for a setting such as `config.data.path`, "" for any other flag."""
  first, dot, _ = name.partition(".")
  return next((flag for flag in _configs() if dot and first in (flag, f"no{flag}")), "")


def asks_for_help(argv: Sequence[str]) -> str:
  """Returns the first flag that asks for help, "" if none does."""
  try:
    return next((word.name for word in _words(argv) if word.name in _HELP), "")
  except (flags.Error, OSError, ValueError):  # A bad flag file, which parsing reports.
    return ""


def helped(argv: Sequence[str], full: bool) -> str:
  """Returns the help of an act: its purpose, its flags, and the settings of its config files.

  Args:
    argv: the command line; settings are listed for the config files on it.
    full: whether to list the flags of libraries too.

  Raises:
    CalmError: if a config file can't be loaded.
  """
  text = io.StringIO()
  with contextlib.redirect_stdout(text):
    app.usage(shorthelp=not full, writeto_stdout=True)
  parts = [text.getvalue().strip()]
  if not full:
    parts.append("--helpfull lists the flags of the libraries too.")
  file_of = {word.name: word.value or "" for word in _words(argv) if word.name in _configs()}
  for flag, file in file_of.items():
    parts.append(settings.listed(settings.load(flag, file), flag, file))
  if _configs() and not file_of:
    parts.append(
      "Settings are flags too, such as --config.training.steps=1000. To list the settings of a "
      "config file, with values and meanings:\n  --config=configs/calm.py:quickstart --help"
    )
  return "\n\n".join(parts)


def require_flag_files(argv: Sequence[str]) -> None:
  """Raises CalmError if a --flagfile on the command line can't be read."""
  try:
    flags.FLAGS.read_flags_from_files(list(argv[1:]), force_gnu=False)
  except (flags.Error, OSError, ValueError) as error:
    raise errors.CalmError(_flag_file_error(error)) from error


def _flag_file_error(error: Exception) -> str:
  """Returns one line for an error of reading flag files."""
  cause = error if isinstance(error, OSError) else error.__context__
  if isinstance(cause, OSError):
    return f"can't read --flagfile={cause.filename}: {cause.strerror}"
  if isinstance(error, UnicodeDecodeError):
    return f"can't read a --flagfile: it is not UTF-8 text: {error}"
  return " ".join(str(error).split())


def reason(argv: Sequence[str], error: Exception) -> str:
  """Returns one line that says why a command line was refused.

  Args:
    argv: the command line.
    error: the error of parsing it.
  """
  try:
    require_flag_files(argv)
  except errors.CalmError as unreadable:
    return str(unreadable)
  file_of: dict[str, str] = {}
  for word in _words(argv):
    flag = _config_of(word.name)
    message = _wrong_setting(flag, word, file_of) if flag else _wrong_flag(word)
    if message:
      return message
    file_of[word.name] = word.value or ""
  required = [name for name in flags.FLAGS if _is_missing(flags.FLAGS[name])]
  if required and isinstance(error, flags.IllegalFlagValueError):
    return f"give {', '.join(f'--{name}=...' for name in required)}; see --help"
  return " ".join(str(error).split()) or type(error).__name__


def _is_missing(flag: flags.Flag) -> bool:
  """Returns whether a required flag has no value."""
  return flag.value is None and any("other than None" in x.message for x in flag.validators)


def _wrong_setting(flag: str, word: _Word, file_of: Mapping[str, str]) -> str:
  """Returns an error message for a setting, "" if it is right.

  Args:
    flag: the config flag.
    word: the setting as given.
    file_of: values of the flags before it, by name.
  """
  option, path = f"--{word.name}", word.name.partition(".")[2]
  if flag not in file_of:
    return f"{option} is a setting of a config file: give --{flag}=FILE before it"
  try:
    values = settings.load(flag, file_of[flag])
  except errors.CalmError as error:
    return str(error)
  value_of = resolve.flat(values)
  if path in value_of:
    parser = _PARSERS.get(type(value_of[path]))
    return _wrong_value(option, word.value, parser or flags.ArgumentParser())
  section: Any = values
  for part in path.split("."):
    section = section.get(part) if isinstance(section, Mapping) else None
  if section is None:
    return f"{option}: {settings.unknown(path, values, flag)}"
  with contextlib.suppress(ValueError, SyntaxError):
    if isinstance(ast.literal_eval(word.value or ""), dict):
      return ""
  names = ", ".join(section)
  return f"{option} holds settings: give {option}.NAME=VALUE, where NAME is one of {names}"


def _wrong_flag(word: _Word) -> str:
  """Returns an error message for a flag, "" if it is right."""
  name = word.name
  flag = _flag(name)
  if flag is not None and config_flags.is_config_flag(flag):
    try:
      settings.load(name, word.value or "")
    except errors.CalmError as error:
      return str(error)
    return ""
  if flag is not None:
    return _wrong_value(f"--{name}", word.value, flag.parser)
  positive = name.removeprefix("no")
  if positive in flags.FLAGS and flags.FLAGS[positive].boolean:
    return f"--{name} takes no value, got {word.value!r}" if word.value is not None else ""
  return f"--{name}: no such flag; {_nearest_flags(name)}"


def _wrong_value(option: str, value: str | None, parser: flags.ArgumentParser) -> str:
  """Returns an error message for the value of a flag, "" if it is right."""
  if value is None:
    is_switch = isinstance(parser, flags.BooleanParser)
    return "" if is_switch else f"{option} needs a value: give {option}=VALUE"
  try:
    parser.parse(value)
  except (TypeError, ValueError) as error:
    if isinstance(parser, flags.EnumParser):
      return f"{option} is {value!r}: {config.nearest(value, parser.enum_values)}"
    expected = "true or false" if isinstance(parser, flags.BooleanParser) else parser.syntactic_help
    if expected.startswith(("integer", "number")):
      expected = f"{'an' if expected[0] == 'i' else 'a'} {expected}"
    return f"{option}={value} must be {expected}" if expected else f"{option}={value}: {error}"
  return ""


def _nearest_flags(name: str) -> str:
  """Returns the flags most like an unknown name; flags of libraries only if none of ours is."""
  first, dot, rest = name.partition(".")
  if dot and (near := spelling.similar(first, _configs())):
    return f"nearest: --{near[0]}.{rest}"
  ours = []
  for module, its_flags in flags.FLAGS.flags_by_module_dict().items():
    if module.startswith(("calm_jax", sys.argv[0])):
      ours += [flag.name for flag in its_flags]
  for names in (ours, list(flags.FLAGS)):
    negated = [f"no{flag}" for flag in names if flags.FLAGS[flag].boolean]
    if near := spelling.similar(name, [*names, *negated]):
      return f"nearest: {', '.join(f'--{flag}' for flag in near)}"
  return "--help lists all"
