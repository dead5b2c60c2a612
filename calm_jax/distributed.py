"""The processes of one job: joining it, exchanging values, and detecting lost processes.

Communication uses the service that `jax.distributed` runs in process 0, so it works before the
first device call and while devices hang.
"""

import atexit
import contextlib
import dataclasses
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar, cast

import jax
from jax._src import distributed as jax_distributed  # The only access to the key-value store.

from calm_jax import errors


@dataclasses.dataclass(frozen=True)
class Processes:
  """How a process joins the others of its job: the values of the flags with these names.

  Attributes:
    coordinator_address: HOST:PORT of process 0; None to detect it, as on TPU pods and Slurm.
    coordinator_bind_address: HOST:PORT that process 0 listens on, if it differs.
    num_processes: number of processes of the job.
    process_id: number of this process, from 0.
    local_device_ids: devices of this machine that this process uses; None for all.
    cluster_detection_method: see `jax.distributed.initialize`.
    initialization_timeout: seconds to wait for all processes to join.
    heartbeat_timeout: seconds without a heartbeat after which a process counts as lost.
    shutdown_timeout: seconds that a process waits for the others at the end.
    expected_processes: number of processes that the job must have; 0 for any number.
  """

  coordinator_address: str | None = None
  coordinator_bind_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  local_device_ids: Sequence[int] | None = None
  cluster_detection_method: str | None = None
  initialization_timeout: int = 300
  heartbeat_timeout: int = 30
  shutdown_timeout: int = 60
  expected_processes: int = 0


# Seconds between heartbeats, and seconds to wait for the answer of another process.
HEARTBEAT_SECONDS, ANSWER_SECONDS = 5, 60
# Seconds that process 0 outlives a lost process, since its own end aborts all others.
LINGER_SECONDS = 5
# Most seconds for each action before an immediate exit.
LAST_SECONDS = 5

T = TypeVar("T")
_turns: dict[str, int] = {}
_heartbeat_timeout = Processes.heartbeat_timeout  # Set by `initialize`.
_exit_actions: list[Callable[[], None]] = []


def _client() -> Any:
  return jax_distributed.global_state.client


def index() -> int:
  """Returns the number of this process, from 0, without a device call."""
  return jax_distributed.global_state.process_id


def count() -> int:
  """Returns the number of processes, without a device call."""
  return jax_distributed.global_state.num_processes


def is_first() -> bool:
  """Returns whether this process is process 0, which writes files and prints figures."""
  return index() == 0


def say(line: str) -> None:
  """Prints a line to standard error, prefixed with the number of this process if there are more."""
  whose = f"process {index()} of {count()}: " if count() > 1 else ""
  print(f"{whose}{line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def before_exit(action: Callable[[], None]) -> Iterator[None]:
  """A context in which `exit_now` first runs `action`, for at most LAST_SECONDS."""
  _exit_actions.append(action)
  try:
    yield
  finally:
    _exit_actions.remove(action)


def exit_now(code: int) -> NoReturn:
  """Ends this process immediately, from any thread, without waiting for other processes."""
  for action in [*_exit_actions]:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(LAST_SECONDS)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def initialize(processes: Processes) -> None:
  """Joins the job that is described or detected; without one, starts a job of one process.

  If not all processes join in time, those that did print a line and exit with
  errors.EXIT_RESTART. From then on a thread watches the others; see `_watch_peers`.

  Raises:
    CalmError: if the description is incomplete, or contradicts the number of processes.
  """
  global _heartbeat_timeout
  _heartbeat_timeout = processes.heartbeat_timeout
  job: dict[str, Any] = dict(
    coordinator_address=processes.coordinator_address,
    coordinator_bind_address=processes.coordinator_bind_address,
    num_processes=processes.num_processes,
    process_id=processes.process_id,
    local_device_ids=processes.local_device_ids,
    cluster_detection_method=processes.cluster_detection_method,
  )
  limits: dict[str, Any] = dict(
    # Longer than the timer of `_give_up`, because JAX would end the process by SIGABRT.
    initialization_timeout=processes.initialization_timeout + ANSWER_SECONDS,
    shutdown_timeout_seconds=processes.shutdown_timeout,
    # Longer than `_watch_peers` waits, because JAX would end the process without a message.
    heartbeat_timeout_seconds=100 + 2 * processes.heartbeat_timeout,
  )
  # On CPUs: with async dispatch, several devices on few cores wait for each other's programs.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  # JAX's handler of SIGTERM would replace ours; see `training.stopping`.
  jax.config.update("jax_enable_preemption_service", False)
  waiting = threading.Timer(processes.initialization_timeout, _give_up, [processes])
  waiting.daemon = True
  waiting.start()
  try:
    jax.distributed.initialize(**job, **limits)
  except ValueError as error:
    if any(value is not None for value in job.values()):
      raise errors.CalmError(
        f"can't join the job: {error} Give --coordinator_address, --num_processes and --process_id"
      ) from error
    _start_alone(limits)
  finally:
    waiting.cancel()
  if count() == 1:  # Gloo prints to standard output; only CPUs of several processes need it.
    jax.config.update("jax_cpu_collectives_implementation", None)
  if processes.expected_processes not in (0, count()):
    raise errors.CalmError(
      f"--expected_processes={processes.expected_processes}, but the job has {count()}"
    )
  if count() > 1:
    _watch_peers()


def _start_alone(limits: dict[str, Any]) -> None:
  """Starts a job of one process."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  jax.distributed.initialize(
    coordinator_address=address,
    coordinator_bind_address=address,
    num_processes=1,
    process_id=0,
    cluster_detection_method="deactivate",
    **limits,
  )


def _give_up(processes: Processes) -> NoReturn:
  """Ends this process because others did not join in time; a later start may find them."""
  print(
    f"error: not all {processes.num_processes or ''} processes joined within "
    f"--initialization_timeout={processes.initialization_timeout} s to "
    f"{processes.coordinator_address or 'process 0'}: start all of them, or give another "
    "--num_processes or --coordinator_address",
    file=sys.stderr,
  )
  exit_now(errors.EXIT_RESTART)


def describe(config_hash: str) -> str:
  """Returns one line on this process: devices, slice, versions. Initializes the devices."""
  local = jax.local_devices()
  slices = sorted({getattr(device, "slice_index", 0) or 0 for device in local})
  return (
    f"{len(local)} of {jax.device_count()} devices ({local[0].device_kind}), slice "
    f"{', '.join(map(str, slices))}, jax {jax.__version__}, config {config_hash}"
  )


def everywhere(name: str, value: bool) -> bool:
  """Returns whether a value is true on all processes; see `exchange`."""
  return all(answer == "True" for answer in exchange(name, str(value)))


def exchange(name: str, value: str, seconds: float = ANSWER_SECONDS) -> list[str]:
  """Returns the values of all processes, ordered by process number.

  All processes must make the same calls of this function in the same order.

  Args:
    name: what is exchanged, for errors.
    value: the value of this process.
    seconds: how long to wait for the other processes.

  Raises:
    CalmError: if a process has not sent its value in time.
  """
  if count() == 1:
    return [value]
  turn = _turns[name] = _turns.get(name, 0) + 1
  client, key = _client(), f"calm_jax/{name}/{turn}"
  client.key_value_set(f"{key}/{index()}", value or " ")  # An empty value can't be stored.
  deadline, values = time.monotonic() + seconds, []
  for process in range(count()):
    left = max(1, int(1000 * (deadline - time.monotonic())))
    try:
      values.append(client.blocking_key_value_get(f"{key}/{process}", left).strip())
    except jax.errors.JaxRuntimeError as error:
      raise errors.CalmError(
        f"process {process} of {count()} has not reached '{name}' within {seconds:.0f} s: look "
        "at its output"
      ) from error
  return values


def together(name: str, action: Callable[[], T]) -> T:
  """Returns the result of `action` on this process; if it fails on any process, all fail.

  Raises:
    CalmError: the error of this process, else that of the first process with one.
  """
  result, problem = None, ""
  try:
    result = action()
  except errors.CalmError as error:
    problem = str(error)
  problems = exchange(name, problem)
  if problem:
    raise errors.CalmError(problem)
  for process, message in enumerate(problems):
    if message:
      raise errors.CalmError(f"process {process}: {message}")
  return cast(T, result)


def on_first(name: str, action: Callable[[], None]) -> None:
  """Runs an action on files in process 0; all processes wait for it and fail if it fails.

  Raises:
    CalmError: the error of `action`.
  """
  together(name, action if is_first() else lambda: None)


def first_number(name: str, action: Callable[[], float]) -> float:
  """Runs an action on files in process 0 and returns its result on all processes.

  Raises:
    CalmError: the error of `action`.
  """
  number = together(name, action if is_first() else lambda: 0.0)
  return float(from_first(f"{name} found", str(number)))


def from_first(name: str, value: str) -> str:
  """Returns process 0's value."""
  return exchange(name, value)[0]


def require_same(name: str, value: str) -> None:
  """Raises CalmError on all processes unless they all have the same value."""
  values = exchange(name, value)
  for process, differing in enumerate(values):
    if differing != values[0]:
      raise errors.CalmError(
        f"process 0 has {name} {values[0]}, process {process} has {differing}: start all of them "
        "with the same command and files"
      )


def _watch_peers() -> None:
  """Starts a thread that ends this process if another process is lost.

  The thread prints a line and exits with errors.EXIT_RESTART within the heartbeat timeout and a
  few seconds. If process 0 is lost, and the service with it, JAX itself ends the others
  immediately by SIGABRT.

  At the end of Python the process leaves the job, which waits for the others, while the thread
  still watches them; then the thread ends. JAX clears its backends after that.
  """
  client, me = _client(), index()
  limit = _heartbeat_timeout
  over = threading.Event()

  def watch():
    beat, seen = 0, {process: ("", time.monotonic()) for process in range(count())}
    while not over.wait(HEARTBEAT_SECONDS):
      beat += 1
      try:
        client.key_value_set(f"calm_jax/alive/{me}", str(beat), allow_overwrite=True)
      except jax.errors.JaxRuntimeError:
        return  # The service is shut down: the job has ended.
      now = time.monotonic()
      for process, (last, since) in seen.items():
        try:
          current = client.key_value_try_get(f"calm_jax/alive/{process}")
        except jax.errors.JaxRuntimeError:
          current = ""  # No heartbeat yet.
        if current != last:
          seen[process] = (current, now)
        elif now - since > limit:
          say(
            f"process {process} has shown no sign of life for {now - since:.0f} s: stopping, to be "
            "started again"
          )
          if me == 0:
            time.sleep(LINGER_SECONDS)
          exit_now(errors.EXIT_RESTART)

  thread = threading.Thread(target=watch, name="peers", daemon=True)

  def end():
    try:
      jax.distributed.shutdown()
    finally:
      over.set()  # A thread that calls the client while Python ends aborts the process.
      thread.join()

  atexit.register(end)
  thread.start()


def await_verdict() -> None:
  """Waits until `_watch_peers` would have ended this process; returns if no process is lost.

  Call it after errors that the end of another process may have caused.
  """
  if count() > 1:
    time.sleep(_heartbeat_timeout + 3 * HEARTBEAT_SECONDS)
