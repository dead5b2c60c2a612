"""Named damage: what manual edits, mix-ups or interrupted acts do to a folder.

The damage of each kind of specimen is in its own module.
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
  """Damage to a specimen and the acts that read it.

  Attributes:
    strike: inflicts the damage; its docstring describes it.
    specimen: name of the specimen.
    acts: names of the acts.
    must_report: whether an act must report the damage even if its result stays the same.
    accepted: whether an act may use the damaged values; see damage.py.
  """

  strike: Strike
  specimen: str
  acts: tuple[str, ...]
  must_report: bool
  accepted: bool


TARGETS: dict[str, Target] = {}


def target(specimen: str, *acts: str, must_report: bool = False, accepted: bool = False):
  """Returns a decorator that adds a function to TARGETS; it may be used for several specimens."""

  def enter(strike: Strike) -> Strike:
    name = strike.__name__.strip("_")
    name = name if name not in TARGETS else f"{name}_of_{specimen}"
    TARGETS[name] = Target(strike, specimen, acts, must_report, accepted)
    return strike

  return enter


def edit(path: pathlib.Path, **changes: Any) -> None:
  """Changes values of a JSON file; names have __ in place of dots."""
  values = json.loads(path.read_text())
  for name, new in changes.items():
    *outer, last = name.split("__")
    parent = values
    for key in outer:
      parent = parent[key]
    parent[last] = new(parent[last]) if callable(new) else new
  path.write_text(json.dumps(values))


def replace(path: pathlib.Path, substitute: pathlib.Path) -> None:
  """Replaces a file or folder by a copy of another."""
  if path.is_dir():
    shutil.rmtree(path)
    shutil.copytree(substitute, path)
  else:
    shutil.copyfile(substitute, path)


def fifo(path: pathlib.Path) -> None:
  """Replaces a file by a named pipe."""
  path.unlink()
  os.mkfifo(path)


def nested(path: pathlib.Path) -> None:
  """Writes JSON that is nested 100,000 deep."""
  path.write_text("[" * 100_000)
