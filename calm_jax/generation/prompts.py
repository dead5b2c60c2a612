"""A file of prompts -> requests; texts -> a file that a second run goes on with."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from calm_jax import config, errors, files
from calm_jax.generation import requests

# What a line may say of its text beside the prompt; the rest is the same for all.
OWN = ("temperature", "num_candidates", "max_tokens", "seed", "stop")
# What its values must be; true and false, which Python counts among the numbers, are none.
_KINDS = {"prompt": "a string", "stop": "a list of strings", "temperature": "a number"}


def read(path: str, common: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns what a JSONL file asks for, a line each: {"prompt": ..., ...} over `common`.

  Raises:
    CalmError: naming the line, if it can't be read, says what is not known, or asks for
      what no text can be.
  """
  content = files.read(path).removesuffix(b"\n")
  config.require(bool(content), f"{path} holds no prompt")
  # Not at U+2028 and its like, which JSON allows inside a string.
  return [
    {**common, "number": number, **_line(line, f"{path}, line {number + 1}", common)}
    for number, line in enumerate(content.split(b"\n"))
  ]


def _line(line: bytes, where: str, common: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a line says; see `read`."""
  values = files.parse_json(line, where)
  config.require("prompt" in values, f'{where} has no "prompt": got {config.shown(values)}')
  for name, value in values.items():
    known = (*OWN, "prompt")
    config.require(name in known, f"{where} has {name!a}: {config.nearest(name, known)}")
    kind = _KINDS.get(name, "a whole number")
    config.require(_is(kind, value), f"{where}: {name} must be {kind}, got {config.shown(value)}")
  config.require(
    config.is_text(values["prompt"]),
    f"{where}: the prompt holds half of a surrogate pair, which is no character",
  )
  asked = {**common, **values, "prompt": ()}
  try:
    requests.Request(**{**asked, "stop": tuple(asked["stop"])})
  except errors.CalmError as error:
    raise errors.CalmError(f"{where}: {error}") from error
  return values


def _is(kind: str, value: Any) -> bool:
  """Tells whether a value that JSON held is of a kind of _KINDS, or a whole number."""
  if kind == "a string":
    return isinstance(value, str)
  if kind == "a list of strings":
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
  numbers = (int, float) if kind == "a number" else int
  return isinstance(value, numbers) and not isinstance(value, bool)


def line(wish: Mapping[str, Any], found: Mapping[str, Any]) -> str:
  """Returns the line that is written of a text: what it was asked for, then what came of it."""
  return json.dumps({**wish, **found}) + "\n"


def written(path: str, wishes: Sequence[Mapping[str, Any]]) -> int:
  """Returns how many texts of an earlier run a file holds; what was cut short is removed.

  Only the beginning of a line that this run would write is removed, and all before it is
  left as it is.

  Raises:
    CalmError: if it holds anything else, or can't be read; nothing is changed then.
  """
  files.require_reachable(path)
  if not epath.Path(path).exists():
    return 0
  content = files.read(path)
  *whole, torn = content.split(b"\n")
  for number, record in enumerate(whole):
    config.require(
      number < len(wishes) and _is_of(record, wishes[number]),
      f"{path}, line {number + 1} is no text of these prompts and settings: give another --output",
    )
  if not torn:
    return len(whole)
  config.require(
    len(whole) < len(wishes) and _begins(torn, wishes[len(whole)]),
    f"{path}, line {len(whole) + 1} has no end, and is not what this command would have begun: "
    "give another --output",
  )
  files.write(path, content[: len(content) - len(torn)])
  return len(whole)


def _is_of(record: bytes, wish: Mapping[str, Any]) -> bool:
  try:
    values = files.parse_json(record, "")
  except errors.CalmError:
    return False
  asked = all(name in values and values[name] == value for name, value in wish.items())
  return asked and isinstance(values.get("text"), str)


def _begins(torn: bytes, wish: Mapping[str, Any]) -> bool:
  """Tells whether bytes are the beginning of the line of a text, whatever was written."""
  before = line(wish, {"text": ""}).removesuffix('"}\n').encode()
  return before.startswith(torn) or torn.startswith(before)
