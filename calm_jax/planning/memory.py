"""A compiled program -> what it holds on a device, and what the compiler says if it can't.

libtpu 0.0.52 refuses a program where arguments + values + temporaries − what they
share exceed what it gives to one, which `Memory.peak` is (found by trying sizes:
15.74 GiB compile for v5e, 15.80 are refused with "15.80G exceeds available HBM
(15.75G)"). It names the sum "HLO temporaries", arguments included.
"""

import dataclasses
import math
import re
from typing import Any

from calm_jax.planning import runs

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device.

  Attributes:
    arguments: what goes in: state, frozen parameters and batch.
    values: what comes out: state and metrics.
    aliased: of the values, what takes the arguments' place.
    temporaries: what is held between.
    code: the program itself, which the limit does not count.
  """

  arguments: int
  values: int
  aliased: int
  temporaries: int
  code: int = 0

  @property
  def peak(self) -> int:
    """What the device must have."""
    return self.arguments + self.values + self.temporaries - self.aliased


@dataclasses.dataclass(frozen=True)
class Overflow:
  """A program that does not fit, in bytes on one device."""

  needed: int
  available: int

  @property
  def excess(self) -> int:
    return self.needed - self.available


@dataclasses.dataclass(frozen=True)
class Buffer:
  """A part of the memory, and the shapes of what it holds one after the other."""

  bytes: int
  shapes: str


def memory_of(compiled: Any, report: str = "") -> Memory:
  """Returns what a `jax.stages.Compiled` holds.

  Args:
    report: libtpu's `memory-usage-report`, which is believed about the temporaries
      where it is given: libtpu 0.0.42.1 tells JAX half as much again as its programs take.
  """
  stats = compiled.memory_analysis()
  held = Memory(
    stats.argument_size_in_bytes,
    stats.output_size_in_bytes,
    stats.alias_size_in_bytes,
    stats.temp_size_in_bytes,
    stats.generated_code_size_in_bytes,
  )
  totals = re.findall(r"^Memory Space: default .*\nTotal bytes: (\d+)", report, re.M)
  if not totals:
    return held
  most = max(map(int, totals))  # Helpers that are compiled before the program have theirs too.
  return dataclasses.replace(held, temporaries=max(0, most - (held.peak - held.temporaries)))


def memory_of_refused(module: runs.Module, overflow: Overflow) -> Memory:
  """Returns what a program would hold that was not compiled, from its text."""
  values = module.entry.root
  parts = [module.entry.instructions[name] for name in values.operands]
  arguments = sum(one.bytes for one in module.entry.parameters.values())
  aliased = sum(
    parts[output[0]].bytes if output and values.opcode == "tuple" else values.bytes
    for output, _ in aliases(module)
  )
  temporaries = overflow.needed - arguments - values.bytes + aliased
  return Memory(arguments, values.bytes, aliased, max(0, temporaries))


def overflow(message: str) -> Overflow | None:
  """Reads the compiler's refusal; None where it is another error."""
  size = r"\(?([\d.]+)([KMGT]?)"
  found = re.search(rf"memory required[^(]*{size}\) exceeds available \w+ {size}", message)
  if not found:  # Wording of libtpu up to 0.0.20, kept by XLA elsewhere.
    found = re.search(rf"Used {size} of {size} hbm", message)
  if not found:
    return None
  needed, unit, available, other = found.groups()
  return Overflow(_bytes(needed, unit), _bytes(available, other))


def _bytes(number: str, unit: str) -> int:
  return math.floor(float(number) * 1024 ** (" KMGT".index(unit or " ")))


def aliases(module: runs.Module) -> list[tuple[tuple[int, ...], int]]:
  """Returns (place in the values, number of the argument) of each donated array."""
  written = re.search(r"input_output_alias=\{(.*?)\}, \w+=", module.header)
  found = re.findall(r"\{([\d, ]*)\}: \((\d+),", written.group(1) if written else "")
  return [
    (tuple(int(number) for number in output.split(",") if number.strip()), int(argument))
    for output, argument in found
  ]


def largest(report: str, count: int = 8) -> list[Buffer]:
  """Returns the largest buffers that a `memory-usage-report` of libtpu lists."""
  rows = re.findall(
    r"^\s*[\d.]+ ?\w+\(\s*\d+%\);\s*([\d.]+) ?([KMGT]?)i?B;\s*\d+;\s*\d+; (.*)$", report, re.M
  )
  buffers = [Buffer(_bytes(number, unit), shapes) for number, unit, shapes in rows]
  return sorted(buffers, key=lambda buffer: -buffer.bytes)[:count]
