"""One writer at a time: a lease on a folder or a file, which ends with its holder.

A lease is a small file, `.lease` in a folder or NAME.lease beside a file, that names the process
which writes there. It is written on condition that nobody else has meanwhile, which works alike
on disks, network file systems and buckets. Whoever reads needs no lease and looks at none.

  the holder is a process of this machine and runs     refused at once
  it is one of this machine and is gone                taken at once
  it is of another machine, or the lease is no JSON    waited for: refused when its heartbeat
                                                       moves, taken when it stood still for EXPIRE

Clocks of two machines are never compared: the heartbeat is a number that goes up.
"""

import atexit
import contextlib
import dataclasses
import os
import sys
import threading
import time
from typing import Any

import tensorstore
from etils import epath

from calm_jax import errors, files
from calm_jax.holder import Holder

# Seconds between two beats, and without one after which a holder counts as gone.
HEARTBEAT, EXPIRE = 10.0, 60.0
# Seconds that an answer of the storage is waited for.
ANSWER = 15.0
# The share of EXPIRE after which a holder no longer takes its lease for granted; a beat that gets
# no answers comes to an end before.
DOUBT = 0.75


def of_folder(path: epath.PathLike) -> str:
  """Returns the path of a folder's lease."""
  return f"{os.fspath(path).rstrip('/')}/.lease"


def of_file(path: epath.PathLike) -> str:
  """Returns the path of a file's lease, the same for all links to it."""
  return f"{os.path.realpath(path) if files.is_local(path) else os.fspath(path)}.lease"


class Lease:
  """A context in which this process alone may write a folder or a file.

  A thread renews the lease; it keeps no process alive, and outlasts errors of the disk.
  """

  def __init__(self, path: str, what: str):
    """Takes nothing yet.

    Args:
      path: of the lease, see `of_folder` and `of_file`.
      what: names in errors what is held, as a flag: --workdir=W.
    """
    self._what = what
    # A pool of its own: a beat does not wait for what else is written.
    context = tensorstore.Context({"file_io_concurrency": {"limit": 1}})
    if files.is_local(path):
      # The file driver reads a backslash as a slash, but not in a key.
      self._path = os.path.realpath(path)
      spec, self._key = {"driver": "file", "path": "/"}, self._path.removeprefix("/")
    else:
      self._path = path
      folder, _, self._key = path.rpartition("/")
      spec = f"{folder}/"
    try:
      self._store = tensorstore.KvStore.open(spec, context=context).result(ANSWER)
    except (OSError, ValueError) as error:  # TimeoutError is an OSError.
      raise self._unreachable(error) from error
    self._holder = Holder.here()
    self._generation = b""
    self._taker = ""
    self._made: list[str] = []
    self._failed = False
    self._watched: Any = None
    self._polls = 0
    self._tried = self._renewed = _now()
    self._lock, self._over = threading.Lock(), threading.Event()
    self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

  def __enter__(self) -> "Lease":
    while wait := self.attempt():
      time.sleep(wait)
    return self

  def __exit__(self, *_) -> None:
    self.release()

  def attempt(self) -> float:
    """Takes the lease if that can be: returns 0 if so, else seconds after which to try again.

    Raises:
      CalmError: if another process holds it, or it can't be written.
    """
    found = self._read()
    if found.state == "value":
      holder = Holder.parse(found.value)
      if holder and holder.token == self._holder.token:  # Written, and the answer was lost.
        return self._begin(found.stamp.generation)
      runs = holder.runs() if holder else None
      if runs:
        raise self._refused(holder)
      if runs is None and not self._stands_still(found.value, holder):
        return HEARTBEAT / 5
    self._made = self._made or self._missing_folders()
    self._tried = self._renewed = _now()
    try:
      self._generation = self._write(self._holder.to_json(), found.stamp.generation)
    except errors.CalmError:
      self._remove_made()
      if self._failed:
        raise
      self._failed = True  # A folder may have gone with another one's lease: once more.
    if not self._generation:
      return HEARTBEAT / 100  # Another process was faster: see which.
    return self._begin(self._generation)

  def _begin(self, generation: bytes) -> float:
    """Keeps the lease alive from now on; returns 0."""
    self._generation = generation
    atexit.register(self.release)
    self._thread.start()
    return 0

  def require_held(self) -> None:
    """Raises CalmError where another process has taken the lease; called before what is written.

    That happens only to a process that stood still, or was cut off, for longer than EXPIRE.
    """
    if _now() - self._tried > DOUBT * EXPIRE:  # The thread stood still as well.
      self._renew()
    if self._taker:
      raise errors.CalmError(
        f"{self._what} was taken over by {self._taker} while this process stood still: nothing "
        "more is written from here; when that one has ended, the same command goes on"
      )

  def release(self) -> None:
    """Gives the lease back, and removes folders that were made for nothing else."""
    if not self._generation:
      return
    atexit.unregister(self.release)
    self._over.set()
    self._thread.join(ANSWER)
    if not self._thread.is_alive() and not self._taker:
      with contextlib.suppress(errors.CalmError):
        self._replace(None)
    self._remove_made()

  def _read(self) -> Any:
    try:
      return self._store.read(self._key).result(ANSWER)
    except (OSError, ValueError) as error:
      raise self._unreachable(error) from error

  def _write(self, content: bytes | None, generation: bytes) -> bytes:
    """Returns the new generation, b"" where what is there is not of the one that is given."""
    try:
      written = self._store.write(self._key, content, if_equal=generation)
      return written.result(ANSWER).generation
    except (OSError, ValueError) as error:
      raise self._unreachable(error) from error

  def _stands_still(self, content: bytes, holder: Holder | None) -> bool:
    """Tells whether a holder of another machine counts as gone; CalmError if it is alive.

    It looks, not seconds, that count: where storage hangs, it hangs for the holder too.
    """
    if self._watched is None:
      self._watched = content
      whose = f"by {holder}" if holder else f"by a process that {self._path} does not tell"
      print(
        f"{self._what} is held {whose}: waiting up to {EXPIRE:.0f} s for a sign of life",
        file=sys.stderr, flush=True,
      )  # fmt: skip
      return False
    if content != self._watched:
      raise self._refused(holder)
    self._polls += 1
    return self._polls * HEARTBEAT / 5 >= EXPIRE

  def _beat(self) -> None:
    while not self._over.wait(HEARTBEAT):
      self._renew()

  def _renew(self) -> None:
    with self._lock:
      if self._taker or self._over.is_set():
        return
      self._holder = dataclasses.replace(self._holder, beat=self._holder.beat + 1)
      with contextlib.suppress(errors.CalmError):  # The next beat tries again.
        self._replace(self._holder.to_json())
      self._tried = _now()  # Only now, so that nobody relies on one that has just begun.

  def _replace(self, content: bytes | None) -> None:
    """Writes the lease anew, or removes it, unless another process has taken it.

    One that somebody removed or damaged by hand is still ours, and so is what was left by a write
    of which we heard no more. But where nothing was renewed for so long that another process may
    have taken it, it may have given it back by now.
    """
    for _ in range(2):
      begun = _now()  # This process may be stopped before it hears that it was written.
      written = self._write(content, self._generation)
      if written:
        self._generation, self._renewed = written, begun
        return
      found = self._read()
      holder = Holder.parse(found.value)
      known = holder or _now() - self._renewed < DOUBT * EXPIRE
      if not known or (holder and holder.token != self._holder.token):
        self._taker = str(holder or "a process that has ended")
        return
      self._generation = found.stamp.generation

  def _missing_folders(self) -> list[str]:
    """Returns the folders that the lease has to make, the deepest first."""
    made, folder = [], os.path.dirname(self._path)
    while files.is_local(self._path) and not os.path.exists(folder):
      made.append(folder)
      folder = os.path.dirname(folder)
    return made

  def _remove_made(self) -> None:
    with contextlib.suppress(OSError):  # Most often: something else was written there.
      for folder in self._made:
        os.rmdir(folder)
    self._made = []

  def _refused(self, holder: Holder | None) -> errors.CalmError:
    whose = holder or f"a process that {self._path} does not tell"
    return errors.CalmError(
      f"{self._what} is being written by {whose}: wait for its end or stop it, or give another "
      f"{self._what.partition('=')[0]}"
    )

  def _unreachable(self, error: Exception) -> errors.CalmError:
    reason = " ".join(str(error).split()) or "no answer"
    return errors.CalmError(f"can't write {self._path}: {reason}")


def _now() -> float:
  """Returns seconds that go on while this machine sleeps, where it can tell them."""
  return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
