"""The identity of a process that holds a lease, and whether the process is still alive."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import secrets
import socket
import time
from typing import Any

from calm_jax import errors, files


@dataclasses.dataclass(frozen=True)
class Holder:
  """The process that a lease names.

  Attributes:
    host: name of its machine.
    boot: id of the boot of its kernel; empty if the system does not report it.
    namespace: its namespace of process ids; empty if the system does not report it.
    pid: its process id.
    started: its start in clock ticks since the boot, because process ids are reused.
    token: random id of this lease.
    since: when the lease was taken, in seconds since the epoch by the holder's clock.
    beat: heartbeat; increases while the holder lives.
  """

  host: str
  boot: str
  namespace: str
  pid: int
  started: int
  token: str
  since: float
  beat: int = 0

  @classmethod
  def here(cls) -> "Holder":
    """Returns this process with a new token."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
      boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
      namespace = os.readlink("/proc/self/ns/pid")
    pid, fields = os.getpid(), _stat(os.getpid())
    started, token = _started(fields) if fields else 0, secrets.token_hex(8)
    return cls(socket.gethostname(), boot, namespace, pid, started, token, time.time())

  @classmethod
  def parse(cls, content: bytes) -> "Holder | None":
    """Returns the holder in a lease's content, None if the content is damaged."""
    try:
      holder = cls(**files.parse_json(content, "lease"))
    except (errors.CalmError, TypeError):
      return None
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
    has_types = all(isinstance(getattr(holder, name), kind) for name, kind in types.items())
    is_valid = has_types and holder.host.isprintable() and math.isfinite(holder.since)
    return holder if is_valid and 0 < holder.pid < 2**31 else None

  def to_json(self) -> bytes:
    """Returns the content of a lease, which `parse` reads."""
    return json.dumps(dataclasses.asdict(self)).encode()

  def runs(self) -> bool | None:
    """Returns whether the process is alive, None if this process can't determine that."""
    here = Holder.here()
    places = [(x.host, x.boot, x.namespace) for x in (self, here)]
    if not (here.boot and here.namespace) or places[0] != places[1]:
      return None
    fields = _stat(self.pid)
    if fields is None:  # Some systems hide other users' processes.
      return None if _exists(self.pid) else False
    return _started(fields) == self.started and not _ended(self.pid, fields)

  def __str__(self) -> str:
    age = max(0, int(time.time() - self.since))
    units = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))
    size, unit = next((x for x in units if age >= 2 * x[0]), units[-1])
    return f"process {self.pid} on {self.host} (since {age // size} {unit})"


def _stat(pid: int) -> list[str] | None:
  """Returns the fields of /proc/PID/stat from the state on, None if there is no such file."""
  try:
    text = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return None
  return text.rpartition(")")[2].split()  # The process name before it may hold anything.


def _started(fields: list[str]) -> int:
  """Returns the start of a process in clock ticks since boot."""
  return int(fields[19])


def _ended(pid: int, fields: list[str]) -> bool:
  """Returns whether a process has ended and only waits for its parent to reap it."""
  try:
    return fields[0] in "ZX" and len(os.listdir(f"/proc/{pid}/task")) < 2
  except OSError:
    return True


def _exists(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except OSError:
    pass
  return True
