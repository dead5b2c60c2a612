"""Ways to take the same training step, each in a process of its own -> seconds of every step.

Libraries of one process would share its memory, its threads and its peak of memory. Where
there is no accelerator all processes live at once and take turns, so that a disturbance
of the machine meets them all; one with an accelerator has it for itself.
"""

import dataclasses
import importlib.util
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from calm_jax import config, errors

WARM_UP = 3  # Steps that are not counted.


@dataclasses.dataclass(frozen=True)
class Job:
  """What all contenders train.

  Attributes:
    name: of its config, for people.
    codec: sizes of the autoencoder that stage two reads; other stages read none.
  """

  name: str
  run: config.Run
  codec: config.Autoencoder
  vocab_size: int


class Steps(Protocol):
  """Training steps of one contender."""

  def dispatch(self) -> Callable[[], None] | None:
    """Begins a step; returns what waits for it to end, None where it has ended."""
    ...

  def facts(self) -> dict[str, Any]:
    """Returns what else is known: `platform`, `device`, `versions`, seconds of parts."""
    ...


Build = Callable[[Job], Steps]


@dataclasses.dataclass(frozen=True)
class Contender:
  """A row of the comparison.

  Attributes:
    build: a function of a module, which another process can import.
    needs: packages without which it is left out.
  """

  name: str
  build: Build
  needs: tuple[str, ...] = ()

  def missing(self) -> list[str]:
    """Returns the packages that are not installed."""
    return [name for name in self.needs if importlib.util.find_spec(name) is None]


def taken(steps: Steps, count: int) -> list[float]:
  """Returns seconds of `count` steps, each begun before the one before it has ended."""
  ends, wait = [time.perf_counter()], None
  for _ in range(count):
    following = steps.dispatch()
    if wait:
      wait()
    if wait or not following:
      ends.append(time.perf_counter())
    wait = following
  if wait:
    wait()
    ends.append(time.perf_counter())
  return np.diff(ends).tolist()


def _peak_bytes() -> int:
  """Of this process, on the host."""
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _work(connection: Any, build: Build, job: Job) -> None:
  """A process: tells when it is ready, then takes as many steps as it is told, 0 for the end."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the command, and that ends this.
  try:
    start = time.perf_counter()
    steps = build(job)
    taken(steps, WARM_UP)
    connection.send({"ready_seconds": time.perf_counter() - start, **steps.facts()})
    while count := connection.recv():
      connection.send(taken(steps, count))
    connection.send({"host_peak_bytes": _peak_bytes(), **steps.facts()})
  except errors.CalmError as error:
    connection.send({"error": str(error)})
  except Exception as error:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    connection.send({"error": f"{type(error).__name__}: {first}"[:300]})


class _Process:
  """A contender at work. `facts` has `error` where it failed."""

  def __init__(self, contender: Contender, job: Job):
    context = multiprocessing.get_context("spawn")
    self._connection, theirs = context.Pipe()
    self._process = context.Process(target=_work, args=(theirs, contender.build, job), daemon=True)
    self._process.start()
    theirs.close()
    self.seconds: list[float] = []
    self.facts: dict[str, Any] = self._hear()

  def _hear(self) -> Any:
    try:
      return self._connection.recv()
    except EOFError:
      self._process.join()
      return {"error": f"its process ended with {self._process.exitcode}"}

  def take(self, count: int) -> None:
    """Takes steps, unless it failed."""
    if "error" in self.facts:
      return
    self._connection.send(count)
    told = self._hear()
    if isinstance(told, dict):
      self.facts = self.facts | told
    else:
      self.seconds += told

  def close(self) -> dict[str, Any]:
    """Ends the process; returns its figures."""
    self.take(0)
    self._process.join()
    return {**self.facts, "step_seconds": self.seconds}


@dataclasses.dataclass(frozen=True)
class Turns:
  """How many steps: `rounds` of `steps` each."""

  rounds: int
  steps: int


ACCELERATOR, CPU = Turns(4, 15), Turns(6, 3)


def compete(
  contenders: Sequence[Contender], job: Job, tell: Callable[[str], None] = lambda line: None
) -> dict[str, dict[str, Any]]:
  """Returns the figures of each contender, by name, of the first alone where it fails.

  Args:
    tell: hears of progress.
  """
  found: dict[str, dict[str, Any]] = {}
  living: dict[str, _Process] = {}
  for contender in contenders:
    if missing := contender.missing():
      found[contender.name] = {"error": f"not installed: {', '.join(missing)}", "step_seconds": []}
      continue
    tell(f"{job.name}: {contender.name} gets ready")
    process = _Process(contender, job)
    if "error" in process.facts and contender is contenders[0]:
      return {contender.name: process.close()}
    if process.facts.get("platform", "cpu") == "cpu":
      living[contender.name] = process
      continue
    for _ in range(ACCELERATOR.rounds):
      process.take(ACCELERATOR.steps)
    found[contender.name] = process.close()
  for number in range(CPU.rounds):
    for process in living.values():
      process.take(CPU.steps)
    if living:
      tell(f"{job.name}: round {number + 1} of {CPU.rounds}")
  found |= {name: process.close() for name, process in living.items()}
  return {contender.name: found[contender.name] for contender in contenders}
