"""A lowered step -> its compiled program, with its text and memory, whether it fits or not.

The text comes from libtpu's dump. `Compiled.as_text()` fails for 7x, whose asynchronous
collectives jaxlib 0.10.2 can't read ("async-update instruction should have 1 operands but
sees 2"), and a refused program has no `Compiled`, though its text matters most.

Compile times on one busy core of two: CALM-M with unrolled layers for 256 chips of v5e
69 s, CALM-XL for 512 of v5p in two slices 243 s; a small transformer of 16 scanned layers
for 256 chips 34 s. A refusal takes less.

JAX's compilation cache is off: it stores a program for a topology and then fails to read
it ("PjRtCompiler must be constructed with a Client").
"""

import contextlib
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from calm_jax.planning.compiled import memory as memory_lib
from calm_jax.planning.compiled import runs


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
  """A program for a topology.

  Attributes:
    overflow: None for a program that fits.
    largest: its largest buffers, empty if libtpu reported none.
    seconds: compile time.
  """

  module: runs.Module
  memory: memory_lib.Memory
  overflow: memory_lib.Overflow | None
  largest: tuple[memory_lib.Buffer, ...]
  seconds: float


def compile_lowered(lowered: Any) -> CompiledProgram:
  """Compiles a `jax.stages.Lowered`.

  Raises:
    JaxRuntimeError: for any failure but lack of memory.
  """
  start = time.perf_counter()
  with tempfile.TemporaryDirectory(prefix="calm_jax_hlo_") as name:
    folder = pathlib.Path(name)
    dump = {"xla_dump_to": name, "xla_dump_hlo_as_text": True}
    compiled = overflow = None
    try:
      with _uncached():
        compiled = lowered.compile(compiler_options=dump)
    except jax.errors.JaxRuntimeError as error:
      overflow = memory_lib.overflow(str(error))
      if overflow is None:
        raise
    seconds = time.perf_counter() - start
    module = runs.read(_text(folder, compiled))
    report = "\n".join(path.read_text() for path in folder.glob("*-memory-usage-report.txt"))
  if overflow:
    memory = memory_lib.memory_of_refused(module, overflow)
  else:
    memory = memory_lib.memory_of(compiled, report)
  return CompiledProgram(module, memory, overflow, tuple(memory_lib.largest(report)), seconds)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
  previous = jax.config.values["jax_enable_compilation_cache"]
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # The cache reads the setting once.
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", previous)
    compilation_cache.reset_cache()


def _text(folder: pathlib.Path, compiled: Any) -> str:
  """Returns the program's text: the largest dump, since helper programs are dumped too."""
  dumps = sorted(folder.glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
  return dumps[-1].read_text() if dumps else compiled.as_text()
