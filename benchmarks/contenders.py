"""Implementations of one training step, each in its own process -> seconds of every step.

In one process, libraries would share memory, threads and the peak of memory. On a CPU all
processes are alive at once and take turns, so that a disturbance of the machine affects all
of them. On an accelerator they run one after the other, each with the device to itself.
"""

import dataclasses
import importlib.util
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import jobs
from calm_jax import errors

Build = Callable[[jobs.BenchmarkJob], jobs.Steps]


@dataclasses.dataclass(frozen=True)
class Contender:
  """One implementation of the training step.

  Attributes:
    build: a module's function, so that another process can import it.
    needs: packages that must be installed; without them the contender is left out.
    plain: whether its process gets `jobs.BenchmarkJob.plain`.
  """

  name: str
  build: Build
  needs: tuple[str, ...] = ()
  plain: bool = False

  def missing(self) -> list[str]:
    """Returns the packages that are not installed."""
    return [name for name in self.needs if importlib.util.find_spec(name) is None]


# Imports inside functions: a process imports this file and the libraries of its own contender.
def _ours(job: jobs.BenchmarkJob) -> jobs.Steps:
  from benchmarks import ours

  return ours.Steps(job)


def _torch(job: jobs.BenchmarkJob) -> jobs.Steps:
  from benchmarks import pytorch

  return pytorch.Steps(job, compiled=False)


def _torch_compiled(job: jobs.BenchmarkJob) -> jobs.Steps:
  from benchmarks import pytorch

  return pytorch.Steps(job, compiled=True)


CONTENDERS = (
  Contender("calm_jax", _ours),
  Contender("PyTorch", _torch, ("torch", "transformers"), plain=True),
  Contender("PyTorch compiled", _torch_compiled, ("torch", "transformers"), plain=True),
)


def step_seconds(steps: jobs.Steps, count: int) -> list[float]:
  """Returns seconds of each of `count` steps; a step starts before its predecessor has ended."""
  ends, wait = [time.perf_counter()], None
  for _ in range(count):
    next_wait = steps.dispatch()
    if wait:
      wait()
    if wait or not next_wait:
      ends.append(time.perf_counter())
    wait = next_wait
  if wait:
    wait()
    ends.append(time.perf_counter())
  return np.diff(ends).tolist()


def _peak_bytes() -> int:
  """Returns this process's peak of host memory."""
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _work(connection: Any, build: Build, job: jobs.BenchmarkJob) -> None:
  """Serves steps in a process of its own: receives a count, sends seconds; 0 ends it.

  Sends facts when it is ready and at its end, or an error.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and with it this process.
  try:
    start = time.perf_counter()
    steps = build(job)
    step_seconds(steps, jobs.WARM_UP)
    connection.send({"ready_seconds": time.perf_counter() - start, **steps.facts()})
    while count := connection.recv():
      connection.send(step_seconds(steps, count))
    connection.send({"host_peak_bytes": _peak_bytes(), **steps.facts()})
  except errors.CalmError as error:
    connection.send({"error": str(error)})
  except Exception as error:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    connection.send({"error": f"{type(error).__name__}: {first}"[:300]})


class _Process:
  """A contender's process. `facts` has `error` if it failed."""

  def __init__(self, contender: Contender, job: jobs.BenchmarkJob):
    context = multiprocessing.get_context("spawn")
    self._connection, child_connection = context.Pipe()
    own = job.plain() if contender.plain else job
    self._process = context.Process(
      target=_work, args=(child_connection, contender.build, own), daemon=True
    )
    self._process.start()
    child_connection.close()
    self.seconds: list[float] = []
    self.facts: dict[str, Any] = self._receive()

  def _receive(self) -> Any:
    try:
      return self._connection.recv()
    except EOFError:
      self._process.join()
      return {"error": f"its process ended with {self._process.exitcode}"}

  def take(self, count: int) -> None:
    """Takes `count` steps, unless the contender has failed."""
    if "error" in self.facts:
      return
    self._connection.send(count)
    answer = self._receive()
    if isinstance(answer, dict):
      self.facts = self.facts | answer
    else:
      self.seconds += answer

  def close(self) -> dict[str, Any]:
    """Ends the process; returns its figures."""
    self.take(0)
    self._process.join()
    return {**self.facts, "step_seconds": self.seconds}


@dataclasses.dataclass(frozen=True)
class Turns:
  """Steps to measure: `rounds` of `steps` each."""

  rounds: int
  steps: int


ACCELERATOR, CPU = Turns(4, 15), Turns(6, 3)


def compete(
  contenders: Sequence[Contender],
  job: jobs.BenchmarkJob,
  report: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, Any]]:
  """Returns the figures of each contender by name; if the first fails, only its error.

  Args:
    report: prints a line of progress.
  """
  figures: dict[str, dict[str, Any]] = {}
  cpu_processes: dict[str, _Process] = {}
  for contender in contenders:
    if missing := contender.missing():
      figures[contender.name] = {
        "error": f"not installed: {', '.join(missing)}",
        "step_seconds": [],
      }
      continue
    report(f"{job.name}: {contender.name} starts")
    process = _Process(contender, job)
    if "error" in process.facts and contender is contenders[0]:
      return {contender.name: process.close()}
    if process.facts.get("platform", "cpu") == "cpu":
      cpu_processes[contender.name] = process
      continue
    for _ in range(ACCELERATOR.rounds):
      process.take(ACCELERATOR.steps)
    figures[contender.name] = process.close()
  for number in range(CPU.rounds):
    for process in cpu_processes.values():
      process.take(CPU.steps)
    if cpu_processes:
      report(f"{job.name}: round {number + 1} of {CPU.rounds}")
  figures |= {name: process.close() for name, process in cpu_processes.items()}
  return {contender.name: figures[contender.name] for contender in contenders}
