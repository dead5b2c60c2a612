"""Processes of one job: joining it, telling each other, and noticing that one is gone.

All of it goes through the service that `jax.distributed` runs in process 0, so that
it works before the first device call and while devices are stuck.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar, cast

import jax
from absl import flags
from jax._src import distributed as jax_distributed  # The one door to the key-value store.

from calm_jax import errors

_COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address", None, "HOST:PORT of process 0; found by itself on TPU pods and Slurm."
)
_COORDINATOR_BIND_ADDRESS = flags.DEFINE_string(
  "coordinator_bind_address", None, "HOST:PORT that process 0 listens on, where that differs."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the job.", 1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", 0)
_LOCAL_DEVICE_IDS = flags.DEFINE_list(
  "local_device_ids", None, "Devices of this machine that this process uses; by default all."
)
_CLUSTER_DETECTION_METHOD = flags.DEFINE_string(
  "cluster_detection_method", None, "How the four above are found: see jax.distributed.initialize."
)
_INITIALIZATION_TIMEOUT = flags.DEFINE_integer(
  "initialization_timeout", 300, "Seconds to wait for all processes to come.", 1
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
  "heartbeat_timeout", 30, "Seconds of silence after which a process counts as gone.", 6
)
_SHUTDOWN_TIMEOUT = flags.DEFINE_integer(
  "shutdown_timeout", 60, "Seconds that a process waits for the others at the end.", 1
)
_EXPECTED_PROCESSES = flags.DEFINE_integer(
  "expected_processes", 0, "Refuse to run with another number of processes; 0 for any.", 0
)

# Seconds between signs of life, and after which an answer of another process is given up.
HEARTBEAT_SECONDS, ANSWER_SECONDS = 5, 60
# Seconds that process 0 stays after the others, which its end would take down with it.
LINGER_SECONDS = 5
# Seconds that what is done before a sudden end may take.
LAST_SECONDS = 5

T = TypeVar("T")
_turns: dict[str, int] = {}
_last: list[Callable[[], None]] = []


def _client() -> Any:
  return jax_distributed.global_state.client


def index() -> int:
  """Returns the number of this process, from 0; without a device call."""
  return jax_distributed.global_state.process_id


def count() -> int:
  """Returns the number of processes; without a device call."""
  return jax_distributed.global_state.num_processes


def is_first() -> bool:
  """Tells whether this process is the one that writes files and shows figures."""
  return index() == 0


def say(line: str) -> None:
  """Prints a line that belongs to this process, on standard error."""
  whose = f"process {index()} of {count()}: " if count() > 1 else ""
  print(f"{whose}{line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def before_exit(action: Callable[[], None]) -> Iterator[None]:
  """A context in which `exit_now` does `action` first, and waits LAST_SECONDS for it."""
  _last.append(action)
  try:
    yield
  finally:
    _last.remove(action)


def exit_now(code: int) -> NoReturn:
  """Ends this process at once, from any thread, without waiting for others."""
  for action in [*_last]:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(LAST_SECONDS)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def initialize() -> None:
  """Joins the job that the flags or the machine describe, else makes one of this process alone.

  Raises:
    CalmError: if the flags are not complete. Where not all processes come in time,
      those that came say so and exit with errors.EXIT_RESTART.
  """
  given: dict[str, Any] = dict(
    coordinator_address=_COORDINATOR_ADDRESS.value,
    coordinator_bind_address=_COORDINATOR_BIND_ADDRESS.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
    local_device_ids=_LOCAL_DEVICE_IDS.value and [int(x) for x in _LOCAL_DEVICE_IDS.value],
    cluster_detection_method=_CLUSTER_DETECTION_METHOD.value,
  )
  limits: dict[str, Any] = dict(
    # JAX ends the process by SIGABRT after it: `_give_up` comes before.
    initialization_timeout=_INITIALIZATION_TIMEOUT.value + ANSWER_SECONDS,
    shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT.value,
    # Our own watch, see `watch_peers`, is to speak first: JAX's would end us without a word.
    heartbeat_timeout_seconds=100 + 2 * _HEARTBEAT_TIMEOUT.value,
  )
  # Several devices on few cores would wait for each other's programs. Of CPUs alone.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  # Its handler would take SIGTERM away from ours; see `training.stopping`.
  jax.config.update("jax_enable_preemption_service", False)
  waiting = threading.Timer(_INITIALIZATION_TIMEOUT.value, _give_up)
  waiting.daemon = True
  waiting.start()
  try:
    jax.distributed.initialize(**given, **limits)
  except ValueError as error:
    if any(value is not None for value in given.values()):
      raise errors.CalmError(
        f"can't join the job: {error} Give --coordinator_address, --num_processes and --process_id"
      ) from error
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{probe.getsockname()[1]}"
    jax.distributed.initialize(
      address, 1, 0, cluster_detection_method="deactivate",
      coordinator_bind_address=address, **limits,
    )  # fmt: skip
  finally:
    waiting.cancel()
  if count() == 1:  # Gloo, which CPUs of several processes need, prints on standard output.
    jax.config.update("jax_cpu_collectives_implementation", None)
  if _EXPECTED_PROCESSES.value not in (0, count()):
    raise errors.CalmError(
      f"--expected_processes={_EXPECTED_PROCESSES.value}, but the job has {count()}"
    )


def _give_up() -> NoReturn:
  """Ends a process that waits for others that don't come; a later start may find them."""
  print(
    f"error: not all {_NUM_PROCESSES.value or ''} processes came within --initialization_timeout="
    f"{_INITIALIZATION_TIMEOUT.value} s to {_COORDINATOR_ADDRESS.value or 'process 0'}: start all "
    "of them, or give another --num_processes or --coordinator_address",
    file=sys.stderr,
  )
  exit_now(errors.EXIT_RESTART)


def describe(config_hash: str) -> str:
  """Returns one line on this process: devices, slice, versions. Starts the devices."""
  local = jax.local_devices()
  slices = sorted({getattr(device, "slice_index", 0) or 0 for device in local})
  return (
    f"{len(local)} of {jax.device_count()} devices ({local[0].device_kind}), slice "
    f"{', '.join(map(str, slices))}, jax {jax.__version__}, config {config_hash}"
  )


def everywhere(name: str, true: bool) -> bool:
  """Tells whether something is true on all processes. All must call it, in the same order."""
  return all(told == "True" for told in exchange(name, str(true)))


def exchange(name: str, value: str, seconds: float = ANSWER_SECONDS) -> list[str]:
  """Returns the value of every process, by its number. All must call it, in the same order.

  Raises:
    CalmError: if one has not told its own within so many seconds.
  """
  if count() == 1:
    return [value]
  turn = _turns[name] = _turns.get(name, 0) + 1
  client, key = _client(), f"calm_jax/{name}/{turn}"
  client.key_value_set(f"{key}/{index()}", value or " ")  # An empty value can't be stored.
  deadline, found = time.monotonic() + seconds, []
  for process in range(count()):
    left = max(1, int(1000 * (deadline - time.monotonic())))
    try:
      found.append(client.blocking_key_value_get(f"{key}/{process}", left).strip())
    except jax.errors.JaxRuntimeError as error:
      raise errors.CalmError(
        f"process {process} of {count()} has not come to '{name}' within {seconds:.0f} s: look "
        "at what it printed"
      ) from error
  return found


def together(name: str, action: Callable[[], T]) -> T:
  """Returns what `action` gives here; if it fails on any process, it fails on all.

  Raises:
    CalmError: this process's own, else the first other one's.
  """
  result, problem = None, ""
  try:
    result = action()
  except errors.CalmError as error:
    problem = str(error)
  problems = exchange(name, problem)
  if problem:
    raise errors.CalmError(problem)
  for process, other in enumerate(problems):
    if other:
      raise errors.CalmError(f"process {process}: {other}")
  return cast(T, result)


def on_first(name: str, action: Callable[[], None]) -> None:
  """Runs an action on files in process 0, once; all wait for it, and fail with it.

  Raises:
    CalmError: what `action` raised.
  """
  together(name, action if is_first() else lambda: None)


def first_number(name: str, action: Callable[[], float]) -> float:
  """Returns to all what an action on files gives in process 0.

  Raises:
    CalmError: what `action` raised.
  """
  found = together(name, action if is_first() else lambda: 0.0)
  return float(from_first(f"{name} found", str(found)))


def from_first(name: str, value: str) -> str:
  """Returns process 0's value."""
  return exchange(name, value)[0]


def require_same(name: str, value: str) -> None:
  """Raises CalmError, on every process, unless all have the same value."""
  values = exchange(name, value)
  for process, other in enumerate(values):
    if other != values[0]:
      raise errors.CalmError(
        f"process 0 has {name} {values[0]}, process {process} has {other}: start all of them with "
        "the same command and files"
      )


def watch_peers(restart_code: int) -> None:
  """Starts a thread that ends this process where another one shows no sign of life.

  It says so in a line, within --heartbeat_timeout and a few seconds. If process 0 is
  gone, and the service with it, JAX itself ends the others at once, by SIGABRT.
  """
  if count() == 1:
    return
  client, me = _client(), index()
  limit = _HEARTBEAT_TIMEOUT.value

  def watch():
    beat, seen = 0, {process: ("", time.monotonic()) for process in range(count())}
    while True:
      time.sleep(HEARTBEAT_SECONDS)
      beat += 1
      try:
        client.key_value_set(f"calm_jax/alive/{me}", str(beat), allow_overwrite=True)
      except jax.errors.JaxRuntimeError:
        return  # The service is shut down: the job has ended.
      now = time.monotonic()
      for process, (last, since) in seen.items():
        try:
          found = client.key_value_try_get(f"calm_jax/alive/{process}")
        except jax.errors.JaxRuntimeError:
          found = ""  # Not a sign yet.
        if found != last:
          seen[process] = (found, now)
        elif found != "done" and now - since > limit:
          say(
            f"process {process} has shown no sign of life for {now - since:.0f} s: stopping, to be "
            "started again"
          )
          if me == 0:
            time.sleep(LINGER_SECONDS)
          exit_now(restart_code)

  threading.Thread(target=watch, name="peers", daemon=True).start()


def await_verdict() -> None:
  """Waits until `watch_peers` would have ended this process; returns where nobody is gone.

  For errors that another process's end may be the cause of.
  """
  if count() > 1:
    time.sleep(_HEARTBEAT_TIMEOUT.value + 3 * HEARTBEAT_SECONDS)
