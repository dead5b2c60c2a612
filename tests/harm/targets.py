"""Damages with a name: what a hand, a mix-up or a half-finished act does to a folder.

Those of each kind of specimen are in modules of their own.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from harm import specimens

Strike = Callable[[specimens.Place], None]


@dataclasses.dataclass(frozen=True)
class Target:
  """A damage to a specimen and the acts that meet it.

  Attributes:
    must_tell: whether it must be told even where the result stays the same.
    taken: whether what now stands there may be taken as it is; see damage.py.
  """

  strike: Strike
  specimen: str
  acts: tuple[str, ...]
  must_tell: bool
  taken: bool


TARGETS: dict[str, Target] = {}


def target(specimen: str, *acts: str, must_tell: bool = False, taken: bool = False):
  """Enters a function into TARGETS, or the same function for several specimens."""

  def enter(strike: Strike) -> Strike:
    name = strike.__name__.strip("_")
    name = name if name not in TARGETS else f"{name}_of_{specimen}"
    TARGETS[name] = Target(strike, specimen, acts, must_tell, taken)
    return strike

  return enter


def edit(path: pathlib.Path, **changes: Any) -> None:
  """Changes values of a JSON file; names have __ for dots."""
  values = json.loads(path.read_text())
  for name, new in changes.items():
    *outer, last = name.split("__")
    inside = values
    for key in outer:
      inside = inside[key]
    inside[last] = new(inside[last]) if callable(new) else new
  path.write_text(json.dumps(values))


def replace(path: pathlib.Path, other: pathlib.Path) -> None:
  """Puts a copy of a file or folder in the place of another."""
  if path.is_dir():
    shutil.rmtree(path)
    shutil.copytree(other, path)
  else:
    shutil.copyfile(other, path)


def fifo(path: pathlib.Path) -> None:
  path.unlink()
  os.mkfifo(path)


def nested(path: pathlib.Path) -> None:
  path.write_text("[" * 100_000)
