"""Seeded damage to one file of a specimen."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable, Sequence
from typing import Any

# JSON values that a reader may not expect where another stood.
ODD = (
  None, True, -1, 0, 0.5, 10**30, float("inf"), "", "x", "../x", [], [[]], [None], {}, {"x": 1},
)  # fmt: skip


@dataclasses.dataclass
class Blow:
  """A damage that is about to happen; `choice` is what its details follow from."""

  specimen: str
  place: str
  damage: str
  choice: random.Random
  others: Sequence[pathlib.Path]

  @classmethod
  def choose(cls, root: pathlib.Path, seed: int, number: int, specimens: Sequence[str]) -> "Blow":
    """Returns the damage of a number: every specimen and every file of one is as likely."""
    choice = random.Random(f"{seed}/{number}")
    specimen = choice.choice(specimens)
    folder = root / specimen
    path = choice.choice(_files(folder))
    others = _of_its_kind(root, specimens, path)
    damage = choice.choice([name for name in DAMAGES if others or name != "swap"])
    return cls(specimen, str(path.relative_to(folder)), damage, choice, others)

  def strike(self, case: pathlib.Path) -> str:
    """Damages a copy of the specimen and returns in words what was done."""
    path = case / self.place
    content = path.read_bytes()
    return DAMAGES[self.damage](self, path, content)

  def flip(self, path: pathlib.Path, content: bytes) -> str:
    """Up to 8 bits are flipped."""
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
    other = self.choice.choice(self.others)
    shutil.copyfile(other, path)
    return f"{other} in its place"

  def wrong_type(self, path: pathlib.Path, content: bytes) -> str:
    """Another JSON value in place of one, of a line or of all; text or a folder for other files."""
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
    """Returns JSON with a value of another type somewhere; ValueError if it is none."""
    value = json.loads(content)
    places = [()] if not isinstance(value, (dict, list)) else list(_places(value))
    where, odd = self.choice.choice(places), self.choice.choice(ODD)
    if not where:
      return json.dumps(odd).encode(), f"{odd!r} in place of all"
    inside = value
    for key in where[:-1]:
      inside = inside[key]
    before = inside[where[-1]]
    inside[where[-1]] = odd
    name = ".".join(map(str, where))
    return json.dumps(value).encode(), f"{name}: {str(before)[:40]!r} became {odd!r}"


DAMAGES: dict[str, Callable[[Blow, pathlib.Path, bytes], str]] = {
  "flip": Blow.flip, "cut": Blow.cut, "zero": Blow.zero, "empty": Blow.empty, "gone": Blow.gone,
  "swap": Blow.swap, "type": Blow.wrong_type,
}  # fmt: skip


def _places(value: Any, at: tuple = ()):
  """Yields the way to every value inside a JSON value, and that to itself."""
  yield at
  if isinstance(value, dict):
    for key, inside in value.items():
      yield from _places(inside, (*at, key))
  elif isinstance(value, list):
    for number, inside in enumerate(value[:20]):
      yield from _places(inside, (*at, number))


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns files in an order that random names have no part in."""
  found = (pathlib.Path(base, name) for base, _, names in os.walk(folder) for name in names)

  def key(path: pathlib.Path) -> tuple:
    random_name = path.parent.name == "d"  # TensorStore's.
    return path.parent, path.stat().st_size if random_name else 0, path.name

  return sorted((path for path in found if not path.name.startswith("events.out")), key=key)


def _of_its_kind(
  root: pathlib.Path, specimens: Sequence[str], path: pathlib.Path
) -> list[pathlib.Path]:
  """Returns files of other content with the same name, or in a folder of the same name."""
  content, found = path.read_bytes(), []
  for specimen in (*specimens, "other_autoencoder", "other_store"):
    for other in _files(root / specimen):
      same = (
        other.name == path.name
        or (other.suffix == path.suffix == "" and other.parent.name == path.parent.name)
        or other.suffix == path.suffix != ""
      )
      if same and other.read_bytes() != content:
        found.append(other)
  return found
