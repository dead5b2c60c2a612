"""A lowered step -> its program for a topology, its text and its memory, fitting or not.

The text comes from libtpu's own dump: `Compiled.as_text()` fails for 7x, whose
asynchronous collectives jaxlib 0.10.2 can't read ("async-update instruction should
have 1 operands but sees 2"), and gives nothing for a program that is refused,
where it is wanted most.

How long it takes, on one busy core of two: CALM-M with layers written out for 256
chips of v5e 69 s, CALM-XL for 512 of v5p in two slices 243 s; a small transformer of
16 scanned layers for 256 chips 34 s. A step that does not fit is refused in less.

JAX's compilation cache is left aside: it stores a program for a topology and fails
to read it ("PjRtCompiler must be constructed with a Client").
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

from calm_jax.planning import memory as memory_lib
from calm_jax.planning import runs


@dataclasses.dataclass(frozen=True)
class Program:
  """What the compiler made.

  Attributes:
    overflow: None for a program that fits.
    largest: its largest buffers, where libtpu told.
    seconds: that compiling took.
  """

  module: runs.Module
  memory: memory_lib.Memory
  overflow: memory_lib.Overflow | None
  largest: tuple[memory_lib.Buffer, ...]
  seconds: float


def compile_lowered(lowered: Any, options: dict[str, Any] | None = None) -> Program:
  """Compiles a `jax.stages.Lowered`.

  Args:
    options: more of XLA's options, as `Lowered.compile` takes them.

  Raises:
    JaxRuntimeError: for anything but too little memory.
  """
  start = time.perf_counter()
  with tempfile.TemporaryDirectory(prefix="calm_jax_hlo_") as name:
    folder = pathlib.Path(name)
    dump = {"xla_dump_to": name, "xla_dump_hlo_as_text": True}
    compiled = overflow = None
    try:
      with _uncached():
        compiled = lowered.compile(compiler_options={**(options or {}), **dump})
    except jax.errors.JaxRuntimeError as error:
      overflow = memory_lib.overflow(str(error))
      if overflow is None:
        raise
    seconds = time.perf_counter() - start
    module = runs.read(_text(folder, compiled))
    report = "\n".join(path.read_text() for path in folder.glob("*-memory-usage-report.txt"))
  if overflow:
    holds = memory_lib.memory_of_refused(module, overflow)
  else:
    holds = memory_lib.memory_of(compiled, report)
  return Program(module, holds, overflow, tuple(memory_lib.largest(report)), seconds)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
  before = jax.config.values["jax_enable_compilation_cache"]
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # It asks the setting once.
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def _text(folder: pathlib.Path, compiled: Any) -> str:
  """The last dump is the program; helpers that are compiled before it have theirs too."""
  dumps = sorted(folder.glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
  return dumps[-1].read_text() if dumps else compiled.as_text()
