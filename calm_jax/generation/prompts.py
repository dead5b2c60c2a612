"""File of prompts -> requests; texts -> a file that a second run resumes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from calm_jax import config, errors, files
from calm_jax.generation import requests

# Settings that a line may have in addition to its prompt; the others are common to all lines.
OWN = ("temperature", "num_candidates", "max_tokens", "seed", "stop")
# Types of values; others are whole numbers. `true` and `false` are not numbers.
_KINDS = {"prompt": "a string", "stop": "a list of strings", "temperature": "a number"}


def read(path: str, common: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns the requests of a JSONL file, one for each line {"prompt": ..., ...}.

  Args:
    common: settings of all requests, which a line overrides.

  Raises:
    CalmError: naming the line, if it can't be read, or has an unknown name or a bad value.
  """
  content = files.read(path).removesuffix(b"\n")
  config.require(bool(content), f"{path} holds no prompt")
  # `splitlines` would also split at U+2028 and the like, which JSON strings may hold.
  return [
    {**common, "number": number, **_line(line, f"{path}, line {number + 1}", common)}
    for number, line in enumerate(content.split(b"\n"))
  ]


def _line(line: bytes, where: str, common: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the values of a line; see `read`."""
  values = files.parse_json(line, where)
  config.require("prompt" in values, f'{where} has no "prompt": got {config.shown(values)}')
  for name, value in values.items():
    names = (*OWN, "prompt")
    config.require(name in names, f"{where} has {name!a}: {config.nearest(name, names)}")
    kind = _KINDS.get(name, "a whole number")
    config.require(
      _has_type(kind, value), f"{where}: {name} must be {kind}, got {config.shown(value)}"
    )
  config.require(
    config.is_text(values["prompt"]),
    f"{where}: the prompt holds half of a surrogate pair, which is not a character",
  )
  request = {**common, **values, "prompt": ()}
  try:
    requests.Request(**{**request, "stop": tuple(request["stop"])})
  except errors.CalmError as error:
    raise errors.CalmError(f"{where}: {error}") from error
  return values


def _has_type(kind: str, value: Any) -> bool:
  """Returns whether a value from JSON is of a type of _KINDS, or a whole number."""
  if kind == "a string":
    return isinstance(value, str)
  if kind == "a list of strings":
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
  numbers = (int, float) if kind == "a number" else int
  return isinstance(value, numbers) and not isinstance(value, bool)


def line(request: Mapping[str, Any], result: Mapping[str, Any]) -> str:
  """Returns the line of a text in the output: its request, then its result."""
  return json.dumps({**request, **result}) + "\n"


def written(path: str, batch: Sequence[Mapping[str, Any]]) -> int:
  """Returns how many texts of an earlier run a file holds, after removing an incomplete line.

  The last line is removed only if it is the beginning of a line that this run would write.
  All lines before it stay unchanged.

  Args:
    batch: all requests of this run, in order.

  Raises:
    CalmError: if the file holds anything else, or can't be read; it is then unchanged.
  """
  files.require_reachable(path)
  if not epath.Path(path).exists():
    return 0
  content = files.read(path)
  *complete, partial_line = content.split(b"\n")
  for number, record in enumerate(complete):
    config.require(
      number < len(batch) and _matches(record, batch[number]),
      f"{path}, line {number + 1} is not a text of these prompts and settings: give another "
      "--output",
    )
  if not partial_line:
    return len(complete)
  config.require(
    len(complete) < len(batch) and _begins(partial_line, batch[len(complete)]),
    f"{path}, line {len(complete) + 1} is incomplete, and not the beginning of a line of this "
    "command: give another --output",
  )
  files.write(path, content[: len(content) - len(partial_line)])
  return len(complete)


def _matches(record: bytes, request: Mapping[str, Any]) -> bool:
  """Returns whether a line holds a text of a request."""
  try:
    values = files.parse_json(record, "")
  except errors.CalmError:
    return False
  is_same = all(name in values and values[name] == value for name, value in request.items())
  return is_same and isinstance(values.get("text"), str)


def _begins(partial_line: bytes, request: Mapping[str, Any]) -> bool:
  """Returns whether bytes are the beginning of a line of a request, for some text."""
  before = line(request, {"text": ""}).removesuffix('"}\n').encode()
  return before.startswith(partial_line) or partial_line.startswith(before)
