"""Wall-clock time of a run, attempt by attempt -> its goodput.

Each attempt writes a file of its own. A file that can't be read is left out, and the next
attempt moves it aside.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

import calm_jax
from calm_jax import errors, files
from calm_jax.training import metrics

FOLDER = "ledger"
# Kinds of time other than the steps themselves.
KINDS = ("startup", "data_wait", "evaluation", "save", "shutdown")
# Seconds between writes of the file.
WRITE_SECONDS = 10


class Ledger:
  """Accounts for the seconds of one attempt, from the start of its process.

  Time that is recorded under no kind counts as time of steps.
  """

  def __init__(self):
    self._started = calm_jax.STARTED
    self._mark = time.time()
    self._parts = {"imports": self._mark - self._started}
    self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    self._path: epath.Path | None = None
    self._written = 0.0
    self._steps = (0, 0)
    self._saved = 0

  def part(self, name: str) -> None:
    """Records the time since the last call as a part of the startup."""
    now = time.time()
    self._parts[name] = self._parts.get(name, 0.0) + now - self._mark
    self._mark = now

  def first_step(self) -> str:
    """Ends the startup; returns a line that lists its parts in seconds."""
    self.part("first step")
    total = sum(self._parts.values())
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._parts.items())
    self._seconds = dict.fromkeys(KINDS, 0.0) | {"startup": total}  # The first wait is in it.
    return f"first step after {total:.1f} s: {parts}"

  @contextlib.contextmanager
  def timed(self, kind: str, *listeners: Callable[[float], None]) -> Iterator[None]:
    """Records the seconds of a block under a kind, and passes them to `listeners`."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    self._seconds[kind] += seconds
    for listener in listeners:
      listener(seconds)

  def open(self, directory: epath.Path, first_step: int) -> None:
    """Creates the attempt's file in a workdir's ledger, under the next free number."""
    folder = directory / FOLDER
    if folder.exists() and not folder.is_dir():
      _set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.stem) for path in _paths(directory)]
    for path in _paths(directory):
      if _read(path) is None:
        _set_aside(path)
    self._path = folder / f"{max(numbers, default=0) + 1:04d}.json"
    self._steps = (first_step, first_step)
    self.write(first_step)

  def saved(self, step: int) -> None:
    """Records that a complete checkpoint of a step exists."""
    self._saved = step
    self.write(max(step, self._steps[1]))

  def write(self, step: int, now: bool = True) -> None:
    """Writes the file with the last step; without `now`, only every WRITE_SECONDS."""
    if self._path is None or not (now or time.time() - self._written > WRITE_SECONDS):
      return
    self._written, self._steps = time.time(), (self._steps[0], step)
    files.write(self._path, files.to_json(self._record()))

  def _record(self) -> dict[str, Any]:
    return {
      "started": round(self._started, 3),
      "written": round(self._written, 3),
      "first_step": self._steps[0],
      "last_step": self._steps[1],
      "saved": self._saved,
      "startup": {name: round(x, 3) for name, x in self._parts.items()},
      "seconds": {name: round(x, 3) for name, x in self._seconds.items()},
    }


def _set_aside(path: epath.Path) -> None:
  aside = path.parent / f"{path.name}{metrics.UNREADABLE}"
  path.replace(aside)
  metrics.show(f"{path} can't be read: moved to {aside}")


def _paths(directory: epath.Path) -> list[epath.Path]:
  folder = directory / FOLDER
  if not folder.is_dir():
    return []
  paths = [path for path in folder.iterdir() if path.suffix == ".json" and path.stem.isdecimal()]
  return sorted(paths, key=lambda path: int(path.stem))


def _read(path: epath.Path) -> dict[str, Any] | None:
  """Returns the record of an attempt; None if it is damaged."""
  try:
    record = files.read_json(path)
  except errors.CalmError:
    return None
  steps = (record.get("first_step"), record.get("last_step"), record.get("saved", 0))
  times = [record.get("started"), record.get("written")]
  seconds = record.get("seconds")
  if not isinstance(seconds, Mapping):
    return None
  times += [seconds.get(kind) for kind in KINDS]
  is_valid = all(type(x) is int and 0 <= x < 2**63 for x in steps) and all(
    isinstance(x, int | float) and 0 <= x < 1e15 for x in times
  )
  return record if is_valid else None


def attempts(directory: epath.Path) -> list[dict[str, Any]]:
  """Returns the records of all attempts that can be read, in order."""
  return [record for path in _paths(directory) if (record := _read(path)) is not None]


def unreadable(directory: epath.Path) -> int:
  """Returns the number of attempts whose record can't be read."""
  return sum(_read(path) is None for path in _paths(directory))


def goodput(directory: epath.Path) -> dict[str, Any] | None:
  """Returns how a run spent the seconds since its first attempt started; None without a ledger.

  `productive` is the time of steps that count, `lost` the time of steps that a later
  attempt repeated, and `down` the time between attempts. `goodput` is the productive
  share of the total.
  """
  records = attempts(directory)
  if not records:
    return None
  result = dict.fromkeys(("productive", "lost", "down", *KINDS), 0.0)
  for attempt, successor in zip(records, [*records[1:], None], strict=True):
    duration = attempt["written"] - attempt["started"]
    steps = attempt["last_step"] - attempt["first_step"]
    stepping = max(0.0, duration - sum(attempt["seconds"].values()))
    num_kept = (
      steps if successor is None else min(steps, successor["first_step"] - attempt["first_step"])
    )
    if steps:
      result["productive"] += stepping * num_kept / steps
      result["lost"] += stepping * (1 - num_kept / steps)
    else:
      result["startup"] += stepping  # It took no step.
    for kind in KINDS:
      result[kind] += attempt["seconds"][kind]
    if successor is not None:
      result["down"] += max(0.0, successor["started"] - attempt["written"])
  total = sum(result.values())
  seconds = {name: round(x, 3) for name, x in result.items()}
  share = round(result["productive"] / total, 4) if total else 0.0
  return {"attempts": len(records), "total": round(total, 3), **seconds, "goodput": share}
