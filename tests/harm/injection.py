"""Makes a file system call fail: the n-th write, rename, fsync, read or mkdir below a folder.

Covers the calls of Python code in all threads. TensorStore and safetensors write from native code:
for safetensors the complete call fails; for arrays of checkpoints the call of Orbax fails, and
their writes fail by a limit on the size of files ("size").
"""

import builtins
import contextlib
import dataclasses
import errno
import io
import json
import os
import pathlib
import resource
import threading
from collections.abc import Callable, Sequence
from typing import Any

import orbax.checkpoint as ocp
import safetensors
from safetensors import numpy as safetensors_numpy

# Operation -> the error codes that it fails with in turn.
ERRORS = {
  "write": (errno.ENOSPC, errno.EIO),
  "rename": (errno.EACCES, errno.EIO),
  "fsync": (errno.EIO, errno.ENOSPC),
  "read": (errno.EACCES, errno.EIO),
  "mkdir": (errno.ENOSPC, errno.EACCES),
}
SIZE = "size"  # Files can't grow beyond a size, so that writes of native code fail too.


@dataclasses.dataclass
class Faults:
  """Counts operations below `root` and makes one of them fail.

  Attributes:
    root: folder in which operations are counted.
    skipped: folders and files that are not counted.
    trace: file to which the operations are logged.
    operation: the kind of operation that fails.
    number: which operation of that kind fails, from 1; 0 for none.
  """

  root: pathlib.Path
  skipped: Sequence[pathlib.Path]
  trace: pathlib.Path
  operation: str = ""
  number: int = 0

  def __post_init__(self):
    self._lock, self._seen = threading.RLock(), dict.fromkeys(ERRORS, 0)
    self._armed = True

  def meet(self, operation: str, path: Any) -> None:
    """Counts an operation; raises OSError if it is the one that fails."""
    place = _absolute(path)
    if not self._armed or place is None or not place.is_relative_to(self.root):
      return
    if any(place.is_relative_to(path) for path in self.skipped):
      return
    with self._lock:
      self._seen[operation] += 1
      count = self._seen[operation]
      os.write(self._log, (json.dumps([operation, str(place)]) + "\n").encode())
    if (operation, count) == (self.operation, self.number):
      codes = ERRORS[operation]
      code = codes[count % len(codes)]
      raise OSError(code, os.strerror(code), str(place))

  def install(self) -> None:
    """Wraps the file functions of this process."""
    self._log = os.open(self.trace, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND, 0o644)
    if self.operation == SIZE:
      hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
      resource.setrlimit(resource.RLIMIT_FSIZE, (self.number, hard))
      return
    self._around(os, "rename", "rename", 1)
    self._around(os, "replace", "rename", 1)
    self._around(os, "link", "rename", 1)
    self._around(os, "mkdir", "mkdir", 0)
    self._around(os, "fsync", "fsync", 0)
    self._around(os, "sendfile", "write", 0)  # shutil copies with it.
    self._around(ocp.CheckpointManager, "restore", "read", 0, lambda self: self.directory)
    self._around(ocp.CheckpointManager, "save", "write", 0, lambda self: self.directory)
    self._around_opens()
    self._around_safetensors()

  def disarm(self) -> None:
    """Stops counting and failing."""
    self._armed = False
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != hard:
      resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

  def _around(
    self, owner: Any, name: str, operation: str, which: int, path: Callable = lambda value: value
  ) -> None:
    call = getattr(owner, name)

    def guarded(*args, **kwargs):
      self.meet(operation, path(args[which]))
      return call(*args, **kwargs)

    setattr(owner, name, guarded)

  def _around_opens(self) -> None:
    plain, low = io.open, os.open

    def opened(file, mode="r", *args, **kwargs):
      if not set(mode) & set("wax+"):
        self.meet("read", file)
        return plain(file, mode, *args, **kwargs)
      return _Written(plain(file, mode, *args, **kwargs), lambda: self.meet("write", file))

    def low_opened(path, flags, *args, **kwargs):
      if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        self.meet("write", path)
      return low(path, flags, *args, **kwargs)

    # A file that is opened by descriptor was counted when it got the descriptor.
    builtins.open, io.open, os.open = opened, opened, low_opened

  def _around_safetensors(self) -> None:
    save, load = safetensors_numpy.save_file, safetensors.safe_open

    def saved(arrays, path, *args, **kwargs):
      try:
        self.meet("write", path)
      except OSError as error:
        pathlib.Path(path).write_bytes(b"\x40")
        raise safetensors.SafetensorError(f"Error while serializing: I/O error: {error}") from error
      return save(arrays, path, *args, **kwargs)

    def loaded(path, *args, **kwargs):
      self.meet("read", path)
      return load(path, *args, **kwargs)

    safetensors_numpy.save_file, safetensors.safe_open = saved, loaded


class _Written:
  """A file opened for writing whose first write may fail halfway."""

  def __init__(self, file, meet: Callable[[], None]):
    self._file, self._meet, self._met = file, meet, False

  def write(self, content):
    if not self._met:
      self._met = True
      try:
        self._meet()
      except OSError:
        self._file.write(content[: len(content) // 2])
        raise
    return self._file.write(content)

  def writelines(self, lines):
    for line in lines:
      self.write(line)

  def __getattr__(self, name):
    return getattr(self._file, name)

  def __enter__(self):
    self._file.__enter__()
    return self

  def __exit__(self, *error):
    return self._file.__exit__(*error)

  def __iter__(self):
    return iter(self._file)


def _absolute(path: Any) -> pathlib.Path | None:
  """Returns the path of a file's name or descriptor, None if there is none."""
  if isinstance(path, int):
    with contextlib.suppress(OSError):
      return pathlib.Path(os.readlink(f"/proc/self/fd/{path}"))
    return None
  with contextlib.suppress(TypeError):
    return pathlib.Path(os.path.abspath(os.fsdecode(os.fspath(path))))
  return None
