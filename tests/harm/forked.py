"""Acts of calm_jax, each in a process forked from one that has imported what they import.

Such a process starts in milliseconds, can be killed where it hangs, and leaves nothing
behind. Whoever imports this module must not have computed anything with JAX, whose
threads a fork does not take along.
"""

import json
import os

# Acts compile much and compute little, on one device: as in conftest.py.
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

# What acts import: everything but the acts themselves, whose flags have the same names.
for _name in (
  "run_flags", "workdir", "generation.decode", "generation.prompts", "generation.session",
  "interchange.formats", "reporting.page", "reporting.summary", "training.program",
  "training.reporter", "training.train",
):  # fmt: skip
  importlib.import_module(f"calm_jax.{_name}")

ROOT = pathlib.Path(__file__).parents[2]
# How lines begin that come and go: those of progress, and what libtpu says where it finds no TPU.
NO_WORD = (
  "train ", "evaluation ", "first step",
  "WARNING:", "E#", "Failed to find host", "===", "learning/",
)  # fmt: skip
NOT_BEGUN = 70  # The exit code where what comes before an act failed, which is a bug of the tool.


@dataclasses.dataclass(frozen=True)
class Ending:
  """What became of an act.

  Attributes:
    code: its exit code, negative for a signal, None where it was killed at its time limit.
    said: standard error. result: what `result` returned, None unless the code is 0.
    seconds: what it took.
  """

  code: int | None
  said: str
  result: Any
  seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Command:
  """The module of an act with its flags, or a function in place of both."""

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
    folder: for its result; must exist.
    result: called in the act's process after exit code 0, with standard output; returns
      what JSON can hold. Where it fails, the result is {"unreadable": why}.
    before: called there first, to change how things work.
    limit: seconds after which it is killed.
  """
  hear, tell = os.pipe()  # No file: files may be what fails.
  began, pid = time.monotonic(), os.fork()
  if not pid:
    _child(command, folder, result, before, tell)
  os.close(tell)
  code, said = _wait(pid, began + limit, hear)
  assert code != NOT_BEGUN, said
  path = folder / "result"
  found = json.loads(path.read_text()) if code == 0 and path.exists() else None
  return Ending(code, said, found, time.monotonic() - began)


def tells_more(ending: Ending, undisturbed: Ending) -> bool:
  """Whether an act said a line, or a page notes one, that an undisturbed one does not."""

  def told(one: Ending) -> set[str]:
    notes = one.result.get("notes", []) if isinstance(one.result, dict) else []
    lines = [*one.said.splitlines(), *notes]
    return {re.sub(r"\b[0-9a-f]{8,}\b|[\d.,]+", "#", line) for line in lines}

  return any(not line.startswith(NO_WORD) for line in told(ending) - told(undisturbed))


def _wait(pid: int, deadline: float, hear: int) -> tuple[int | None, str]:
  """Returns the exit code of a child, None for one that had to be killed, and what it said."""
  os.set_blocking(hear, False)
  heard, done, status = bytearray(), 0, 0
  while not done and time.monotonic() < deadline:
    done, status = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(BlockingIOError):
      while block := os.read(hear, 2**16):
        heard += block
    time.sleep(0 if done else 0.005)
  if not done:
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
  os.close(hear)
  return os.waitstatus_to_exitcode(status) if done else None, heard.decode(errors="replace")


def _child(command: Command, folder: pathlib.Path, result, before, tell: int) -> None:
  """Runs the act and ends the process."""
  code = 1
  try:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (folder / "result").unlink(missing_ok=True)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream, end in ((0, nothing), (1, nothing), (2, tell)):
      os.dup2(end, stream)
    sys.stdout = printed = io.StringIO()
    os.chdir(ROOT)
    if jax.config.values["jax_compilation_cache_dir"] is None:
      jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
    calm_jax.STARTED = time.time()
    lease.HEARTBEAT, lease.EXPIRE = 0.5, 2.0  # A damaged one is waited for.
    provenance.commit = lambda: None  # It would change when a file of the checkout does.
    code = NOT_BEGUN
    before()
    code = _code(command)
    if code == 0:
      try:
        found = result(printed.getvalue())
      except Exception as error:
        found = {"unreadable": repr(error)}
      (folder / "result").write_text(json.dumps(found))
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stderr.flush()
    os._exit(code)


def _code(command: Command) -> int:
  """Runs the act here; returns the code that its process would exit with."""
  try:
    command()
  except SystemExit as end:
    return end.code if isinstance(end.code, int) else int(end.code is not None)
  except BaseException:
    traceback.print_exc()
    return 1
  return 0
