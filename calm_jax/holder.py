"""A process, told apart from all others: who holds a lease, and whether it is still alive."""

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
    boot, namespace: of the kernel that it runs on and of its process ids; empty where the
      system does not tell them.
    started: of the process, in clock ticks since that boot: an id may be used again.
    token: of this lease, random. since: seconds since the epoch, by the holder's clock.
    beat: goes up as long as the holder lives.
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
    """Returns this process, with a token of its own."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
      boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
      namespace = os.readlink("/proc/self/ns/pid")
    pid, fields = os.getpid(), _stat(os.getpid())
    started, token = _started(fields) if fields else 0, secrets.token_hex(8)
    return cls(socket.gethostname(), boot, namespace, pid, started, token, time.time())

  @classmethod
  def parse(cls, content: bytes) -> "Holder | None":
    """Returns the holder that a lease names, None where it is damaged."""
    try:
      found = cls(**files.parse_json(content, "lease"))
    except (errors.CalmError, TypeError):
      return None
    kinds: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
    fits = all(isinstance(getattr(found, name), kind) for name, kind in kinds.items())
    told = fits and found.host.isprintable() and math.isfinite(found.since)
    return found if told and 0 < found.pid < 2**31 else None

  def to_json(self) -> bytes:
    """Returns what `parse` takes."""
    return json.dumps(dataclasses.asdict(self)).encode()

  def runs(self) -> bool | None:
    """Tells whether the process is alive, None where that can't be told from here."""
    here = Holder.here()
    places = [(x.host, x.boot, x.namespace) for x in (self, here)]
    if not (here.boot and here.namespace) or places[0] != places[1]:
      return None
    fields = _stat(self.pid)
    if fields is None:  # Some systems hide the processes of other users.
      return None if _exists(self.pid) else False
    return _started(fields) == self.started and not _ended(self.pid, fields)

  def __str__(self) -> str:
    age = max(0, int(time.time() - self.since))
    units = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))
    size, unit = next((x for x in units if age >= 2 * x[0]), units[-1])
    return f"process {self.pid} on {self.host} (since {age // size} {unit})"


def _stat(pid: int) -> list[str] | None:
  """Returns what /proc tells of a process, from its state on; None where that is nothing."""
  try:
    text = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return None
  return text.rpartition(")")[2].split()  # The name before may hold anything.


def _started(fields: list[str]) -> int:
  return int(fields[19])


def _ended(pid: int, fields: list[str]) -> bool:
  """Tells whether a process has ended, and only waits for its parent to notice."""
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
