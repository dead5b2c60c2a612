"""Random damage to one file of a specimen, from a seed."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable, Sequence
from typing import Any

# JSON values that a reader may not expect in place of the original value.
ODD_NUMBERS = (True, -1, 0, 0.5, 10**30, float("inf"))
ODD = (None, *ODD_NUMBERS, "", "x", "../x", [], [[]], [None], {}, {"x": 1})


@dataclasses.dataclass
class Blow:
  """Damage to a file, not inflicted yet.

  Attributes:
    specimen: name of the specimen.
    place: path of the file in it.
    damage: key of DAMAGES.
    choice: random numbers that determine the details.
    substitutes: files that `swap` may put in its place.
  """

  specimen: str
  place: str
  damage: str
  choice: random.Random
  substitutes: Sequence[pathlib.Path]

  @classmethod
  def choose(cls, root: pathlib.Path, seed: int, number: int, specimens: Sequence[str]) -> "Blow":
    """Returns the damage of a number; all specimens, and all files of one, are equally likely."""
    choice = random.Random(f"{seed}/{number}")
    specimen = choice.choice(specimens)
    folder = root / specimen
    path = choice.choice(_files(folder))
    substitutes = _of_its_kind(root, specimens, path)
    damage = choice.choice([name for name in DAMAGES if substitutes or name != "swap"])
    return cls(specimen, str(path.relative_to(folder)), damage, choice, substitutes)

  def strike(self, case: pathlib.Path) -> str:
    """Damages a copy of the specimen and returns a description of the damage."""
    path = case / self.place
    content = path.read_bytes()
    return DAMAGES[self.damage](self, path, content)

  def flip(self, path: pathlib.Path, content: bytes) -> str:
    """Flips up to 8 bits."""
    if not content:
      return self.extend(path, content)
    changed, bits = bytearray(content), []
    for _ in range(self.choice.choice((1, 1, 2, 8))):
      bit = self.choice.randrange(8 * len(content))
      changed[bit // 8] ^= 1 << bit % 8
      bits.append(bit)
    path.write_bytes(changed)
    return f"bits {bits} of {8 * len(content)} flipped"

  def extend(self, path: pathlib.Path, content: bytes) -> str:
    path.write_bytes(content + self.choice.randbytes(16))
    return "16 random bytes at the end"

  def cut(self, path: pathlib.Path, content: bytes) -> str:
    left = self.choice.randrange(max(1, len(content)))
    path.write_bytes(content[:left])
    return f"cut after {left} of {len(content)} bytes"

  def zero(self, path: pathlib.Path, content: bytes) -> str:
    start = self.choice.randrange(max(1, len(content)))
    count = self.choice.randint(1, 4096)
    part = content[start : start + count]
    path.write_bytes(content[:start] + bytes(len(part)) + content[start + len(part) :])
    return f"bytes {start} to {start + len(part)} of {len(content)} zeroed"

  def empty(self, path: pathlib.Path, content: bytes) -> str:
    path.write_bytes(b"")
    return "emptied"

  def gone(self, path: pathlib.Path, content: bytes) -> str:
    path.unlink()
    return "removed"

  def swap(self, path: pathlib.Path, content: bytes) -> str:
    substitute = self.choice.choice(self.substitutes)
    shutil.copyfile(substitute, path)
    return f"{substitute} in its place"

  def wrong_type(self, path: pathlib.Path, content: bytes) -> str:
    """Replaces a JSON value, or a file that is not JSON, by one of another type."""
    if path.suffix == ".jsonl":
      lines = content.splitlines()
      number = self.choice.randrange(len(lines))
      lines[number], what = self._odd(lines[number])
      path.write_bytes(b"\n".join(lines) + b"\n")
      return f"line {number + 1}: {what}"
    try:
      changed, what = self._odd(content)
    except ValueError:
      if self.choice.random() < 0.5:
        path.unlink()
        path.mkdir()
        return "a folder in its place"
      changed, what = b'{"text": []}', "JSON in its place"
    path.write_bytes(changed)
    return what

  def _odd(self, content: bytes) -> tuple[bytes, str]:
    """Returns JSON with one value replaced, and a description; raises ValueError if not JSON."""
    value = json.loads(content)
    paths = [()] if not isinstance(value, (dict, list)) else list(_paths(value))
    path, odd = self.choice.choice(paths), self.choice.choice(ODD)
    if not path:
      return json.dumps(odd).encode(), f"{odd!r} in place of all"
    parent = value
    for key in path[:-1]:
      parent = parent[key]
    before = parent[path[-1]]
    parent[path[-1]] = odd
    name = ".".join(map(str, path))
    return json.dumps(value).encode(), f"{name}: {str(before)[:40]!r} became {odd!r}"


DAMAGES: dict[str, Callable[[Blow, pathlib.Path, bytes], str]] = {
  "flip": Blow.flip,
  "cut": Blow.cut,
  "zero": Blow.zero,
  "empty": Blow.empty,
  "gone": Blow.gone,
  "swap": Blow.swap,
  "type": Blow.wrong_type,
}


def _paths(value: Any, path: tuple = ()):
  """Yields the path of a JSON value, and those of all values in it."""
  yield path
  if isinstance(value, dict):
    for key, child in value.items():
      yield from _paths(child, (*path, key))
  elif isinstance(value, list):
    for number, child in enumerate(value[:20]):
      yield from _paths(child, (*path, number))


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files below a folder in an order that does not depend on random names."""
  paths = (pathlib.Path(base, name) for base, _, names in os.walk(folder) for name in names)

  def key(path: pathlib.Path) -> tuple:
    random_name = path.parent.name == "d"  # TensorStore chooses names at random.
    return path.parent, path.stat().st_size if random_name else 0, path.name

  return sorted((path for path in paths if not path.name.startswith("events.out")), key=key)


def _of_its_kind(
  root: pathlib.Path, specimens: Sequence[str], path: pathlib.Path
) -> list[pathlib.Path]:
  """Returns files of other content with the same name, suffix or name of the folder."""
  content, substitutes = path.read_bytes(), []
  for specimen in (*specimens, "other_autoencoder", "other_store"):
    for candidate in _files(root / specimen):
      similar = (
        candidate.name == path.name
        or (candidate.suffix == path.suffix == "" and candidate.parent.name == path.parent.name)
        or candidate.suffix == path.suffix != ""
      )
      if similar and candidate.read_bytes() != content:
        substitutes.append(candidate)
  return substitutes
