"""Checks that a folder is as it was written: `python -m calm_jax.verify PATH`.

PATH is a token store, a workdir, or a folder that `calm_jax.convert` reads and writes. Each check
reads its part of the folder and prints a line. At the first difference the exit code is 2 and the
last line says why.
"""

import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from etils import epath

from calm_jax import cli, errors, files, seal, workdir_checks
from calm_jax.data import store
from calm_jax.interchange import checking

# (name, check) pairs; a check returns a line on the result, or raises CalmError at a difference.
Checks = Iterator[tuple[str, Callable[[], str]]]


class Kind(NamedTuple):
  """A kind of folder.

  Attributes:
    name: its name for people.
    matches: whether the folder at a path is of this kind.
    checks: yields its checks.
  """

  name: str
  matches: Callable[[str], bool]
  checks: Callable[[str], Checks]


def _holds(path: str, *names: str) -> bool:
  """Returns whether the folder at `path` holds one of `names`."""
  return any((epath.Path(path) / name).exists() for name in names)


def _exported(path: str) -> Checks:
  for name, check in checking.CHECKS.items():
    yield name, lambda check=check: check(pathlib.Path(path))


# Tried in this order, because a workdir may hold the files of an exported folder too.
KINDS = (
  Kind(
    "token store",
    lambda path: _holds(path, store.MANIFEST),
    lambda path: store.TokenStore.open(path).checks(),
  ),
  Kind("workdir", lambda path: _holds(path, seal.FILE, "origin.json"), workdir_checks.checks),
  Kind(
    "exported folder",
    lambda path: files.is_local(path) and checking.is_exported(pathlib.Path(path)),
    _exported,
  ),
)


def verify(path: str, show: Callable[[str], None] = print) -> None:
  """Runs all checks of a folder and shows a line for each that passes.

  Raises:
    CalmError: at the first check that fails, or if `path` is none of KINDS.
  """
  files.require_reachable(str(epath.Path(path) / seal.FILE))
  kind = next((kind for kind in KINDS if kind.matches(path)), None)
  if kind is None:
    names = " or ".join(kind.name for kind in KINDS)
    problem = f"is not a {names}" if epath.Path(path).exists() else "does not exist"
    raise errors.CalmError(f"{path} {problem}: give the path of a {names}")
  show(f"{kind.name} {path}")
  count = 0
  for name, check in kind.checks(path):
    show(f"  {name:32} {check()}")
    count += 1
  show(f"{count} checks, all as written")


def main(path: str) -> None:
  """Verifies the folder at `path` and prints the checks."""
  jax.config.update("jax_platforms", "cpu")  # An accelerator may be in use, and is not needed.
  verify(path, lambda line: print(line, flush=True))


if __name__ == "__main__":
  cli.run(main, "PATH")
