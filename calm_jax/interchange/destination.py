"""Writes an exported folder next to its destination and renames it when it is complete."""

import contextlib
import fcntl
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

from calm_jax import errors, files, interrupts

# A file in a folder that is being written. The writer locks it until the process ends.
_LOCK = "calm_jax.lock"
_TRIES, _PAUSE_SECONDS = 20, 0.1


def require_local(path: str) -> None:
  """Raises CalmError for a bucket's URL: folders of other frameworks must be local."""
  if not files.is_local(path):
    raise errors.CalmError(f"{path} is not a local folder: convert on a disk, then copy")


@contextlib.contextmanager
def new_folder(output: str) -> Iterator[pathlib.Path]:
  """A context that yields a folder to write into, which becomes `output` on success.

  First removes unfinished folders of killed processes for the same output.

  Raises:
    CalmError: if `output` exists already or can't be written.
  """
  require_local(output)
  target = pathlib.Path(output)
  try:
    if target.exists():
      raise errors.CalmError(f"{output} exists already: give a new --output")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    with _locked_folder(target) as workspace:
      partial = workspace / target.name
      partial.mkdir()
      yield partial
      partial.rename(target)
      files.sync(target.parent)
  except OSError as error:
    raise errors.CalmError(f"can't write --output={output}: {error}") from error


def _prefix(target: pathlib.Path) -> str:
  """Returns how the names of unfinished folders of `target` begin."""
  return f".{target.name}."


@contextlib.contextmanager
def _locked_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A context that yields a new folder next to `target`, locked, and removes it at the end."""
  workspace = pathlib.Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
  try:
    lock_path = workspace / f"{_LOCK}.new"
    with lock_path.open("w") as lock, interrupts.first(lambda: _remove(workspace)):
      with contextlib.suppress(OSError):  # Without file locks, other runs remove nothing.
        fcntl.flock(lock, fcntl.LOCK_EX)
      lock_path.rename(workspace / _LOCK)  # So that nobody sees the file without its lock.
      yield workspace
  finally:
    _remove(workspace)


def _remove(workspace: pathlib.Path) -> None:
  """Removes a locked folder; if some of it can't be removed, the next run tries again."""
  for _ in range(_TRIES):
    with contextlib.suppress(FileNotFoundError):  # Another process removed it.
      for path in workspace.iterdir():
        if path.is_dir():
          shutil.rmtree(path, ignore_errors=True)
        elif path.name != _LOCK:
          path.unlink()
      if any(path.name != _LOCK for path in workspace.iterdir()):
        time.sleep(_PAUSE_SECONDS)  # After Ctrl-C, threads may still be writing.
        continue
      shutil.rmtree(workspace, ignore_errors=True)
    return


def _remove_abandoned(target: pathlib.Path) -> None:
  """Removes unfinished folders of `target` whose process has ended."""
  for workspace in target.parent.iterdir():
    if not workspace.name.startswith(_prefix(target)):
      continue
    try:
      with (workspace / _LOCK).open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # Not one of ours, or its process is alive.
      continue
    _remove(workspace)
