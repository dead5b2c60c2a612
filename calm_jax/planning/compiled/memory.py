"""A compiled program -> its memory on a device; the compiler's refusal -> what was missing.

libtpu 0.0.52 refuses a program if arguments + values + temporaries − aliased bytes exceed
its limit. `Memory.peak` is that sum (found by trial: 15.74 GiB compile for v5e, 15.80 are
refused with "15.80G exceeds available HBM (15.75G)"). libtpu calls the sum "HLO
temporaries", arguments included.
"""

import dataclasses
import math
import re
from typing import Any

from calm_jax.planning.compiled import runs

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device.

  Attributes:
    arguments: inputs: state, frozen parameters and batch.
    values: outputs: state and metrics.
    aliased: the part of the values that overwrites donated arguments.
    temporaries: intermediate arrays.
  """

  arguments: int
  values: int
  aliased: int
  temporaries: int

  @property
  def peak(self) -> int:
    """Bytes that the device must have."""
    return self.arguments + self.values + self.temporaries - self.aliased


@dataclasses.dataclass(frozen=True)
class Overflow:
  """Bytes on one device that a refused program needs, and those available."""

  needed: int
  available: int

  @property
  def excess(self) -> int:
    return self.needed - self.available


@dataclasses.dataclass(frozen=True)
class Buffer:
  """A buffer, and the shapes of the arrays that share it over time."""

  bytes: int
  shapes: str


def memory_of(compiled: Any, report: str = "") -> Memory:
  """Returns the memory of a `jax.stages.Compiled`.

  Args:
    report: libtpu's `memory-usage-report`, or "". Its temporaries are preferred, since
      libtpu 0.0.42.1 reports half as much again to JAX as its programs need.
  """
  stats = compiled.memory_analysis()
  memory = Memory(
    stats.argument_size_in_bytes,
    stats.output_size_in_bytes,
    stats.alias_size_in_bytes,
    stats.temp_size_in_bytes,
  )
  totals = re.findall(r"^Memory Space: default .*\nTotal bytes: (\d+)", report, re.M)
  if not totals:
    return memory
  total = max(map(int, totals))  # Helper programs, compiled before, have smaller totals.
  others = memory.peak - memory.temporaries
  return dataclasses.replace(memory, temporaries=max(0, total - others))


def memory_of_refused(module: runs.Module, overflow: Overflow) -> Memory:
  """Returns the memory that a refused program would have, from its text."""
  values = module.entry.root
  parts = [module.entry.instructions[name] for name in values.operands]
  arguments = sum(parameter.bytes for parameter in module.entry.parameters.values())
  aliased = sum(
    parts[output[0]].bytes if output and values.opcode == "tuple" else values.bytes
    for output, _ in aliases(module)
  )
  temporaries = overflow.needed - arguments - values.bytes + aliased
  return Memory(arguments, values.bytes, aliased, max(0, temporaries))


def overflow(message: str) -> Overflow | None:
  """Parses the compiler's refusal for lack of memory; None for another error."""
  size = r"\(?([\d.]+)([KMGT]?)"
  match = re.search(rf"memory required[^(]*{size}\) exceeds available \w+ {size}", message)
  if not match:
    return None
  needed, needed_unit, available, available_unit = match.groups()
  return Overflow(_bytes(needed, needed_unit), _bytes(available, available_unit))


def _bytes(number: str, unit: str) -> int:
  return math.floor(float(number) * 1024 ** (" KMGT".index(unit or " ")))


def aliases(module: runs.Module) -> list[tuple[tuple[int, ...], int]]:
  """Returns (index into the values, number of the argument) of each donated array."""
  aliased = re.search(r"input_output_alias=\{(.*?)\}, \w+=", module.header)
  pairs = re.findall(r"\{([\d, ]*)\}: \((\d+),", aliased.group(1) if aliased else "")
  return [
    (tuple(int(number) for number in output.split(",") if number.strip()), int(argument))
    for output, argument in pairs
  ]


def largest(report: str, count: int = 8) -> list[Buffer]:
  """Returns the largest buffers in libtpu's `memory-usage-report`, at most `count`."""
  rows = re.findall(
    r"^\s*[\d.]+ ?\w+\(\s*\d+%\);\s*([\d.]+) ?([KMGT]?)i?B;\s*\d+;\s*\d+; (.*)$", report, re.M
  )
  buffers = [Buffer(_bytes(number, unit), shapes) for number, unit, shapes in rows]
  return sorted(buffers, key=lambda buffer: -buffer.bytes)[:count]
