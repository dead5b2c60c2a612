"""Runs acts of calm_jax, each in a fork of a process that has imported their modules.

A fork starts in milliseconds, can be killed if it hangs, and leaves nothing behind. A process that
imports this module must not have computed anything with JAX, because threads do not survive a
fork.
"""

import json
import os

# Acts compile much and compute little, on one device; see conftest.py.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0"
  " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
  " --xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import contextlib
import dataclasses
import importlib
import io
import pathlib
import re
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax

import calm_jax
from calm_jax import cli, lease
from calm_jax.reporting import provenance

# Imports the modules that acts import, but not the acts, whose flags have the same names.
for _name in (
  "run_flags",
  "workdir",
  "generation.decode",
  "generation.prompts",
  "generation.session",
  "interchange.reading",
  "reporting.page",
  "reporting.summary",
  "running.conversion",
  "running.starting",
  "running.texts",
  "running.train",
  "training.program",
  "training.reporter",
):
  importlib.import_module(f"calm_jax.{_name}")

ROOT = pathlib.Path(__file__).parents[2]
# Prefixes of lines that vary between runs: progress, and libtpu's messages on a missing TPU.
PROGRESS = ("train ", "evaluation ", "first step")
LIBTPU = ("WARNING:", "E#", "Failed to find host", "===", "learning/")
NOT_BEGUN = 70  # Exit code if the preparation of an act fails, which is a bug of the tool.


@dataclasses.dataclass(frozen=True)
class Ending:
  """How an act ended.

  Attributes:
    code: its exit code, negative for a signal, None if it was killed at its time limit.
    stderr: its standard error.
    result: its result, None unless the code is 0.
    seconds: its running time.
  """

  code: int | None
  stderr: str
  result: Any
  seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Command:
  """The module of an act with its flags, or a function to call instead."""

  words: Sequence[str] = ()
  call: Callable[[], None] | None = None

  def __call__(self) -> None:
    sys.argv = list(self.words) or ["call"]
    if self.call:
      cli.run(self.call)
    runpy.run_module(self.words[0], run_name="__main__", alter_sys=True)


def run(
  command: Command,
  folder: pathlib.Path,
  result: Callable[[str], Any] = lambda printed: None,
  before: Callable[[], None] = lambda: None,
  limit: float = 60,
) -> Ending:
  """Runs an act and returns how it ended.

  Args:
    command: the act.
    folder: folder of its result; must exist.
    result: called in the act's process after exit code 0, with standard output; returns JSON
      values. If it fails, the result is {"unreadable": reason}.
    before: called in the act's process first, for example to patch functions.
    limit: seconds after which the act is killed.
  """
  read_end, write_end = os.pipe()  # Not a file, because files may fail.
  began, pid = time.monotonic(), os.fork()
  if not pid:
    _child(command, folder, result, before, write_end)
  os.close(write_end)
  code, stderr = _wait(pid, began + limit, read_end)
  assert code != NOT_BEGUN, stderr
  path = folder / "result"
  values = json.loads(path.read_text()) if code == 0 and path.exists() else None
  return Ending(code, stderr, values, time.monotonic() - began)


def reports_more(ending: Ending, undisturbed: Ending) -> bool:
  """Returns whether an act prints a line, or a note, that the undisturbed act does not."""

  def lines_of(ending: Ending) -> set[str]:
    notes = ending.result.get("notes", []) if isinstance(ending.result, dict) else []
    lines = [*ending.stderr.splitlines(), *notes]
    return {re.sub(r"\b[0-9a-f]{8,}\b|[\d.,]+", "#", line) for line in lines}

  more = lines_of(ending) - lines_of(undisturbed)
  return any(not line.startswith(PROGRESS + LIBTPU) for line in more)


def _wait(pid: int, deadline: float, read_end: int) -> tuple[int | None, str]:
  """Returns the exit code of a child, None if it had to be killed, and its standard error."""
  os.set_blocking(read_end, False)
  output, done, status = bytearray(), 0, 0
  while not done and time.monotonic() < deadline:
    done, status = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(BlockingIOError):
      while block := os.read(read_end, 2**16):
        output += block
    time.sleep(0 if done else 0.005)
  if not done:
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
  os.close(read_end)
  return os.waitstatus_to_exitcode(status) if done else None, output.decode(errors="replace")


def _child(command: Command, folder: pathlib.Path, result, before, write_end: int) -> None:
  """Runs the act and ends the process."""
  code = 1
  try:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (folder / "result").unlink(missing_ok=True)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream, end in ((0, nothing), (1, nothing), (2, write_end)):
      os.dup2(end, stream)
    sys.stdout = printed = io.StringIO()
    os.chdir(ROOT)
    if jax.config.values["jax_compilation_cache_dir"] is None:
      jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
    calm_jax.STARTED = time.time()
    lease.HEARTBEAT, lease.EXPIRE = 0.5, 2.0  # A damaged lease makes the act wait.
    provenance.commit = lambda: None  # The commit would change with the files of the checkout.
    code = NOT_BEGUN
    before()
    code = _code(command)
    if code == 0:
      try:
        values = result(printed.getvalue())
      except Exception as error:
        values = {"unreadable": repr(error)}
      (folder / "result").write_text(json.dumps(values))
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stderr.flush()
    os._exit(code)


def _code(command: Command) -> int:
  """Runs the act and returns the code that its process would exit with."""
  try:
    command()
  except SystemExit as end:
    return end.code if isinstance(end.code, int) else int(end.code is not None)
  except BaseException:
    traceback.print_exc()
    return 1
  return 0
