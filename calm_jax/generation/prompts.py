"""A file of prompts -> requests; texts -> a file that a second run goes on with."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from calm_jax import config, errors, files

# What a line may say of its text beside the prompt; the rest is the same for all.
OWN = ("temperature", "num_candidates", "max_tokens", "seed", "stop")


def read(path: str, common: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns what a JSONL file asks for, a line each: {"prompt": ..., ...} over `common`.

  Raises:
    CalmError: naming the line, if it can't be read or says what is not known.
  """
  try:
    lines = epath.Path(path).read_text().removesuffix("\n").split("\n")
  except (OSError, UnicodeError) as error:
    raise errors.CalmError(f"can't read the prompts {path}: {error}") from error
  # Not at U+2028 and its like, which JSON allows inside a string.
  config.require(lines != [""], f"{path} holds no prompt")
  found = []
  for number, line in enumerate(lines):
    where = f"{path}, line {number + 1}"
    try:
      values = json.loads(line)
    except ValueError as error:
      raise errors.CalmError(f"{where} is no JSON: {error}") from error
    known = isinstance(values, dict) and isinstance(values.get("prompt"), str)
    config.require(known, f'{where} is no object with a "prompt": got {line[:80]}')
    for name, value in values.items():
      config.require(
        name == "prompt" or name in OWN, f"{where} has {name!r}: {config.nearest(name, OWN)}"
      )
      kinds = {"stop": list, "temperature": (int, float)}.get(
        name, str if name == "prompt" else int
      )
      config.require(isinstance(value, kinds), f"{where} has {name} {value!r}")
    found.append({**common, "number": number, **values})
  return found


def written(path: str, wishes: Sequence[Mapping[str, Any]]) -> int:
  """Returns how many texts of an earlier run a file holds; what was cut short is removed.

  Raises:
    CalmError: if it holds anything else.
  """
  place = epath.Path(path)
  if not place.exists():
    return 0
  text = place.read_text()
  whole = text[: text.rfind("\n") + 1]
  for number, line in enumerate(whole.splitlines()):
    try:
      record = json.loads(line)
      same = number < len(wishes) and all(
        record.get(name) == value for name, value in wishes[number].items()
      )
    except (ValueError, AttributeError):
      same = False
    config.require(
      same,
      f"{path}, line {number + 1} is no text of these prompts and settings: give another --output",
    )
  if whole != text:
    files.write(path, whole)
  return len(whole.splitlines())
