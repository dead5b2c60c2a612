"""One writer at a time: a lease on a folder or a file that expires with its holder.

A lease is a small file, `.lease` in a folder or NAME.lease next to a file, that names the process
that writes there. It is written conditionally: the write fails if another process has written
since, on disks, network file systems and buckets alike. Readers need no lease and ignore leases.

  The holder of the lease                            a new process
  runs on this machine                               is refused immediately
  ran on this machine and has ended                  takes the lease immediately
  is on another machine, or the lease is no JSON     waits: it is refused when the heartbeat
                                                     changes, and takes the lease when it has not
                                                     changed for EXPIRE seconds

Clocks of two machines are never compared: the heartbeat is an increasing number.
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

# Seconds between two heartbeats, and seconds without one after which a holder counts as gone.
HEARTBEAT, EXPIRE = 10.0, 60.0
# Seconds to wait for an answer of the storage.
ANSWER = 15.0
# Share of EXPIRE without a renewal after which a holder checks its lease before a write; longer
# than a heartbeat whose requests all time out.
DOUBT = 0.75


def of_folder(path: epath.PathLike) -> str:
  """Returns the path of a folder's lease."""
  return f"{os.fspath(path).rstrip('/')}/.lease"


def of_file(path: epath.PathLike) -> str:
  """Returns the path of a file's lease, which is the same for all links to the file."""
  return f"{os.path.realpath(path) if files.is_local(path) else os.fspath(path)}.lease"


class Lease:
  """A context in which only this process may write a folder or a file.

  A daemon thread renews the lease and retries after errors of the storage.
  """

  def __init__(self, path: str, what: str):
    """Opens the storage; `attempt` or entering the context takes the lease.

    Args:
      path: path of the lease; see `of_folder` and `of_file`.
      what: the flag that names the leased path, for errors: --workdir=W.
    """
    self._what = what
    # A separate thread pool, so that heartbeats do not wait for other writes.
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
    """Tries to take the lease; returns 0 on success, else the seconds until the next try.

    Raises:
      CalmError: if another process holds the lease, or it can't be written.
    """
    current = self._read()
    if current.state == "value":
      holder = Holder.parse(current.value)
      if holder and holder.token == self._holder.token:  # Written, but the answer was lost.
        return self._begin(current.stamp.generation)
      runs = holder.runs() if holder else None
      if runs:
        raise self._refused(holder)
      if runs is None and not self._has_expired(current.value, holder):
        return HEARTBEAT / 5
    self._made = self._made or self._missing_folders()
    self._tried = self._renewed = _now()
    try:
      self._generation = self._write(self._holder.to_json(), current.stamp.generation)
    except errors.CalmError:
      self._remove_made()
      if self._failed:
        raise
      self._failed = True  # Another process may have removed a folder with its lease: try again.
    if not self._generation:
      return HEARTBEAT / 100  # Another process was faster: find out which.
    return self._begin(self._generation)

  def _begin(self, generation: bytes) -> float:
    """Starts to renew the lease; returns 0."""
    self._generation = generation
    atexit.register(self.release)
    self._thread.start()
    return 0

  def require_held(self) -> None:
    """Raises CalmError if another process has taken the lease; call it before each write.

    That happens only if this process was suspended or cut off for longer than EXPIRE.
    """
    if _now() - self._tried > DOUBT * EXPIRE:  # The thread was suspended too.
      self._renew()
    if self._taker:
      raise errors.CalmError(
        f"{self._what} was taken over by {self._taker} while this process was suspended: nothing "
        "more is written here; when that process has ended, the same command resumes"
      )

  def release(self) -> None:
    """Gives the lease back and removes the folders that were made only for it."""
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
    """Returns TensorStore's read result: state, value and stamp."""
    try:
      return self._store.read(self._key).result(ANSWER)
    except (OSError, ValueError) as error:
      raise self._unreachable(error) from error

  def _write(self, content: bytes | None, generation: bytes) -> bytes:
    """Writes the lease if it still has `generation`, and returns the new generation, else b""."""
    try:
      written = self._store.write(self._key, content, if_equal=generation)
      return written.result(ANSWER).generation
    except (OSError, ValueError) as error:
      raise self._unreachable(error) from error

  def _has_expired(self, content: bytes, holder: Holder | None) -> bool:
    """Returns whether a holder on another machine counts as gone.

    Counts reads, not seconds, because storage that hangs here also hangs for the holder.

    Raises:
      CalmError: if the content has changed, so that the holder is alive.
    """
    if self._watched is None:
      self._watched = content
      message = (
        f"{self._what} is held by {self._name(holder)}: "
        f"waiting up to {EXPIRE:.0f} s for a sign of life"
      )
      print(message, file=sys.stderr, flush=True)
      return False
    if content != self._watched:
      raise self._refused(holder)
    self._polls += 1
    return self._polls * HEARTBEAT / 5 >= EXPIRE

  def _beat(self) -> None:
    """Renews the lease every HEARTBEAT seconds until it is released."""
    while not self._over.wait(HEARTBEAT):
      self._renew()

  def _renew(self) -> None:
    """Writes the lease with the next heartbeat."""
    with self._lock:
      if self._taker or self._over.is_set():
        return
      self._holder = dataclasses.replace(self._holder, beat=self._holder.beat + 1)
      with contextlib.suppress(errors.CalmError):  # The next beat tries again.
        self._replace(self._holder.to_json())
      self._tried = _now()  # At the end, because a renewal that has begun proves nothing.

  def _replace(self, content: bytes | None) -> None:
    """Rewrites the lease, or removes it (None), unless another process has taken it.

    A lease that was removed or damaged by hand still belongs to this process, and so does the
    result of a write whose answer was lost. But if the last renewal is so old that another process
    may have taken the lease, that process may also have released it since.
    """
    for _ in range(2):
      begun = _now()  # Before the write: this process may be suspended before the answer.
      written = self._write(content, self._generation)
      if written:
        self._generation, self._renewed = written, begun
        return
      current = self._read()
      holder = Holder.parse(current.value)
      still_ours = holder or _now() - self._renewed < DOUBT * EXPIRE
      if not still_ours or (holder and holder.token != self._holder.token):
        self._taker = str(holder or "a process that has ended")
        return
      self._generation = current.stamp.generation

  def _missing_folders(self) -> list[str]:
    """Returns the folders that must be made for the lease, the deepest first."""
    made, folder = [], os.path.dirname(self._path)
    while files.is_local(self._path) and not os.path.exists(folder):
      made.append(folder)
      folder = os.path.dirname(folder)
    return made

  def _remove_made(self) -> None:
    with contextlib.suppress(OSError):  # Usually because something else was written there.
      for folder in self._made:
        os.rmdir(folder)
    self._made = []

  def _refused(self, holder: Holder | None) -> errors.CalmError:
    return errors.CalmError(
      f"{self._what} is being written by {self._name(holder)}: wait for its end or stop it, or "
      f"give another {self._what.partition('=')[0]}"
    )

  def _name(self, holder: Holder | None) -> str:
    return str(holder or f"a process that {self._path} does not name")

  def _unreachable(self, error: Exception) -> errors.CalmError:
    reason = " ".join(str(error).split()) or "no answer"
    return errors.CalmError(f"can't write {self._path}: {reason}")


def _now() -> float:
  """Returns a monotonic time in seconds that, if the system can, includes suspended time."""
  return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
