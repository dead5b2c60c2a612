"""The act of checking: `python -m calm_jax.verify PATH`.

PATH is a token store, a workdir, or a folder as `calm_jax.convert` reads and writes. All
that there is to check of it is read and told, a line each; the exit code is 2, and the
last line says why, at the first thing that is not as it was written.
"""

import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from etils import epath

from calm_jax import cli, errors, files, seal, workdir_checks
from calm_jax.data import store
from calm_jax.interchange import checking

# What is checked, and the check: it returns what was found, and raises CalmError at a lie.
Checks = Iterator[tuple[str, Callable[[], str]]]


class Kind(NamedTuple):
  """A kind of folder: what it is called, how it is told, and what there is to check of it."""

  name: str
  tells: Callable[[str], bool]
  checks: Callable[[str], Checks]


def _holds(path: str, *names: str) -> bool:
  return any((epath.Path(path) / name).exists() for name in names)


def _exported(path: str) -> Checks:
  for name, check in checking.CHECKS.items():
    yield name, lambda check=check: check(pathlib.Path(path))


# In the order in which they are asked: a workdir may hold an exported folder's files too.
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
  """Checks all there is to check of a folder and shows a line for each thing that is whole.

  Raises:
    CalmError: at the first thing that is not as it was written, or where `path` is none
      of KINDS.
  """
  files.require_reachable(str(epath.Path(path) / seal.FILE))
  kind = next((kind for kind in KINDS if kind.tells(path)), None)
  if kind is None:
    there = "holds" if epath.Path(path).exists() else "is not there:"
    names = ", no ".join(kind.name for kind in KINDS)
    raise errors.CalmError(f"{path} {there} no {names}: give the path of one")
  show(f"{kind.name} {path}")
  count = 0
  for name, check in kind.checks(path):
    show(f"  {name:32} {check()}")
    count += 1
  show(f"{count} checks, all as written")


def main(path: str) -> None:
  jax.config.update("jax_platforms", "cpu")  # An accelerator may be at work, and need not be.
  verify(path, lambda line: print(line, flush=True))


if __name__ == "__main__":
  cli.run(main, "PATH")
