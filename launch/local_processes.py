"""Runs one command as several processes on this machine, like a cluster on several hosts.

    python launch/local_processes.py --processes=4 --devices=2 -- \\
      python -m calm_jax.main --config=configs/calm.py:quickstart --workdir=W

`--coordinator_address=127.0.0.1:PORT --num_processes=N --process_id=I` is appended to the command
of each process, and its lines of output begin with `[I] `. SIGTERM and SIGINT are passed to every
process once. After a process has failed, the others have --grace_seconds to stop and are then
killed.

The exit code is 0 if all processes exit with 0; 75, which requests a restart, if a process exits
with 75 and all other failures are signals; else the first other exit code.
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from absl import app, flags

EXIT_BAD_INPUT, EXIT_START_AGAIN = 2, 75
POLL_SECONDS = 0.05
DEVICE_COUNT = "--xla_force_host_platform_device_count"


def free_port() -> int:
  """Returns a port of 127.0.0.1 that is free now."""
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def commands(command: Sequence[str], processes: int, port: int) -> list[list[str]]:
  """Returns the command of each process."""
  job = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}"]
  return [[*command, *job, f"--process_id={index}"] for index in range(processes)]


def settings(index: int, devices: int, platform: str) -> dict[str, str]:
  """Returns the environment variables that give process `index` its devices.

  On `cpu` the devices are simulated; on `cuda` each process sees its own GPUs.
  """
  if platform != "cpu":
    own = range(index * devices, (index + 1) * devices)
    return {"JAX_PLATFORMS": platform, "CUDA_VISIBLE_DEVICES": ",".join(map(str, own))}
  other_flags = [
    flag for flag in os.environ.get("XLA_FLAGS", "").split() if DEVICE_COUNT not in flag
  ]
  return {
    "JAX_PLATFORMS": platform,
    "XLA_FLAGS": " ".join([*other_flags, f"{DEVICE_COUNT}={devices}"]),
  }


def run(
  command: Sequence[str],
  processes: int,
  devices: int = 1,
  platform: str = "cpu",
  grace_seconds: float = 120,
) -> list[int]:
  """Runs the processes until they end and prints their output; call it from the main thread.

  Returns:
    The exit code of each process, -n if signal n ended it.

  Raises:
    OSError: if the command can't be started.
  """
  received: list[int] = []
  children: list[subprocess.Popen] = []
  readers: list[threading.Thread] = []
  lock = threading.Lock()
  with _recorded(received):
    try:
      for index, own in enumerate(commands(command, processes, free_port())):
        child = _start(own, settings(index, devices, platform))
        children.append(child)
        for source, sink in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
          reader = threading.Thread(target=_copy, args=(source, sink, f"[{index}] ", lock))
          reader.daemon = True
          reader.start()
          readers.append(reader)
      _wait(children, received, grace_seconds)
    finally:
      for child in children:
        _kill(child)
  for reader in readers:  # A process that was left running may hold the output open.
    reader.join(timeout=5)
  return [child.wait() for child in children]


def exit_code(codes: Sequence[int]) -> int:
  """Returns one exit code for all processes; see the module."""
  failed = [code for code in codes if code]
  worse = [code for code in failed if code > 0 and code != EXIT_START_AGAIN]
  if worse:
    return worse[0]
  if EXIT_START_AGAIN in failed:
    return EXIT_START_AGAIN
  return 128 - failed[0] if failed else 0


@contextlib.contextmanager
def _recorded(received: list[int]) -> Iterator[None]:
  """A context that appends SIGTERM and SIGINT to `received` instead of handling them.

  If SIGINT is ignored, as in a background job, it stays ignored.
  """
  previous_handlers = {
    number: signal.signal(number, lambda number, _: received.append(number))
    for number in (signal.SIGTERM, signal.SIGINT)
    if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN
  }
  try:
    yield
  finally:
    for number, handler in previous_handlers.items():
      signal.signal(number, handler)


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
  """Starts a process in its own process group, so that Ctrl-C reaches it once, through us."""
  return subprocess.Popen(
    command,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    errors="replace",
    env=os.environ | environment,
    process_group=0,
  )


def _copy(source: IO[str], sink: IO[str], prefix: str, lock: threading.Lock) -> None:
  """Copies lines until the source ends, even if our own reader has ended."""
  with source:
    for line in source:
      with lock, contextlib.suppress(OSError, ValueError):
        sink.write(f"{prefix}{line}" if line.endswith("\n") else f"{prefix}{line}\n")
        sink.flush()


def _wait(children: Sequence[subprocess.Popen], received: list[int], grace_seconds: float) -> None:
  """Waits until all processes have ended, or `grace_seconds` after the first failure."""
  deadline = None
  while any([child.poll() is None for child in children]):
    while received:
      number = received.pop(0)
      for child in children:
        if child.poll() is None:
          child.send_signal(number)
    if deadline is None and any(child.returncode for child in children):
      deadline = time.monotonic() + grace_seconds
    if deadline is not None and time.monotonic() > deadline:
      running = [str(index) for index, child in enumerate(children) if child.returncode is None]
      problem = f"still running {grace_seconds:g} s after another failed: killed"
      print(f"process {', '.join(running)} {problem}", file=sys.stderr)
      return
    time.sleep(POLL_SECONDS)


def _kill(child: subprocess.Popen) -> None:
  """Kills a process and the rest of its process group."""
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(child.pid, signal.SIGKILL)
  child.wait()


def main() -> None:
  """Parses flags, runs and exits."""
  # Flags are defined here so that an import of this file defines none.
  processes = flags.DEFINE_integer("processes", None, "Number of processes.", lower_bound=1)
  devices = flags.DEFINE_integer("devices", 1, "Devices of each process.", lower_bound=1)
  platform = flags.DEFINE_enum("platform", "cpu", ["cpu", "cuda"], "JAX platform.")
  grace_seconds = flags.DEFINE_float(
    "grace_seconds", 120, "Seconds for the others to stop after a process failed.", lower_bound=0
  )
  dry_run = flags.DEFINE_bool("dry_run", False, "Print the commands and run nothing.")

  def parse(argv: Sequence[str]) -> Sequence[str]:
    try:
      rest = flags.FLAGS(argv)
      if processes.value is None:
        raise flags.Error("give --processes=N")
      if len(rest) < 2:
        raise flags.Error("give the command of the processes after --")
    except flags.Error as error:
      _fail(" ".join(str(error).split()))
    return rest

  def act(argv: Sequence[str]) -> int:
    command = argv[1:]
    if dry_run.value:
      for index, own in enumerate(commands(command, processes.value, free_port())):
        variables = settings(index, devices.value, platform.value)
        environment = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
        print(f"[{index}] {environment} {shlex.join(own)}")
      return 0
    try:
      codes = run(command, processes.value, devices.value, platform.value, grace_seconds.value)
    except OSError as error:
      _fail(f"can't run {command[0]}: {error.strerror}")
    return exit_code(codes)

  app.run(act, flags_parser=parse)


def _fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
  main()
