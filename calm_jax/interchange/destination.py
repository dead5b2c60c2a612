"""Where an exported folder is written: beside its place, and moved there whole."""

import contextlib
import fcntl
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

from calm_jax import errors, files, interrupts

# In a folder being written; whoever writes it holds it locked, and a dead process holds nothing.
_LOCK = "calm_jax.lock"
_TRIES, _PAUSE_SECONDS = 20, 0.1


def require_local(path: str) -> None:
  """Raises CalmError for a bucket's URL: folders of other frameworks are files here."""
  if not files.is_local(path):
    raise errors.CalmError(f"{path} is no local folder: convert on a disk, then copy")


@contextlib.contextmanager
def new_folder(output: str) -> Iterator[pathlib.Path]:
  """Gives a folder to write into that becomes `output` at the end, if nothing went wrong.

  What processes that were killed left of the same output is removed first.

  Raises:
    CalmError: if `output` is there already or can't be written.
  """
  require_local(output)
  target = pathlib.Path(output)
  try:
    if target.exists():
      raise errors.CalmError(f"{output} exists already: give a new --output")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(target)
    with _held(target) as place:
      partial = place / target.name
      partial.mkdir()
      yield partial
      partial.rename(target)
      files.sync(target.parent)
  except OSError as error:
    raise errors.CalmError(f"can't write --output={output}: {error}") from error


def _prefix(target: pathlib.Path) -> str:
  return f".{target.name}."


@contextlib.contextmanager
def _held(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a new folder beside `target`, locked as long as this process lives; gone at the end."""
  place = pathlib.Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
  try:
    own = place / f"{_LOCK}.new"
    with own.open("w") as lock, interrupts.first(lambda: _remove(place)):
      with contextlib.suppress(OSError):  # A file system without locks: nothing is removed there.
        fcntl.flock(lock, fcntl.LOCK_EX)
      own.rename(place / _LOCK)  # Never seen unlocked.
      yield place
  finally:
    _remove(place)


def _remove(place: pathlib.Path) -> None:
  """Removes a folder with a lock; where that is not all removed, it stays for the next run."""
  for _ in range(_TRIES):
    with contextlib.suppress(FileNotFoundError):  # Removed already.
      for path in place.iterdir():
        if path.is_dir():
          shutil.rmtree(path, ignore_errors=True)
        elif path.name != _LOCK:
          path.unlink()
      if any(path.name != _LOCK for path in place.iterdir()):
        time.sleep(_PAUSE_SECONDS)  # After Ctrl-C threads that save may still be writing.
        continue
      shutil.rmtree(place, ignore_errors=True)
    return


def _remove_left(target: pathlib.Path) -> None:
  """Removes folders that were to become `target` and whose process has ended."""
  for place in target.parent.iterdir():
    if not place.name.startswith(_prefix(target)):
      continue
    try:
      with (place / _LOCK).open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # None of ours, or held by a process that is alive.
      continue
    _remove(place)
