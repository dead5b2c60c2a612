"""Computations -> how often each runs.

XLA writes a loop's body once and its cost analysis counts it once, so whatever
is summed over a program with scanned layers has to know how often they run. CPU
and GPU programs state it (`known_trip_count`); those for a TPU do not, and their
loops may be peeled, so a loop's counters are run until its condition fails.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from calm_jax.planning import hlo

_LONGEST_LOOP = 100_000


@dataclasses.dataclass(frozen=True)
class Module:
  """A program.

  Attributes:
    header: its first line.
    counts: how often each computation runs, for each that runs. Every branch of a
      conditional is counted as run.
    trips: how often each loop runs its body, by name; None where the program does
      not tell, which `counts` takes for once.
    fused: computations that run inside one instruction.
  """

  header: str
  computations: Mapping[str, hlo.Computation]
  entry: hlo.Computation
  counts: Mapping[str, int]
  trips: Mapping[str, int | None]
  fused: frozenset[str]

  def running(self) -> Iterator[tuple[hlo.Computation, hlo.Instruction, int]]:
    """Yields every instruction that runs, with its computation and how often."""
    for name, count in self.counts.items():
      for one in self.computations[name]:
        yield self.computations[name], one, count

  @property
  def partitions(self) -> int:
    """Devices that the program is written for: those of one slice."""
    found = re.search(r"num_partitions=(\d+)", self.header)
    return int(found.group(1)) if found else 1


def read(text: str) -> Module:
  """Returns the program that `compiled.as_text()` printed.

  Raises:
    ValueError: where there is no program in it.
  """
  written = hlo.parse(text)
  walk = _Walk(written.computations)
  walk.run(written.entry.name, 1)
  fused = frozenset(walk.fused)
  return Module(written.header, written.computations, written.entry, walk.counts, walk.trips, fused)


# A scalar integer, a tuple of such values, or None for anything else.
Value = Any
_OPERATIONS: dict[str, Callable[[int, int], int]] = {
  "add": operator.add,
  "subtract": operator.sub,
  "multiply": operator.mul,
  "minimum": min,
  "maximum": max,
  "and": operator.and_,
  "or": operator.or_,
}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
  "LT": operator.lt,
  "LE": operator.le,
  "GT": operator.gt,
  "GE": operator.ge,
  "EQ": operator.eq,
  "NE": operator.ne,
}
_PASSING = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier"}


class _Frame:
  """A computation with what is known of its parameters."""

  def __init__(
    self,
    computations: Mapping[str, hlo.Computation],
    name: str,
    parameters: Callable[[int], Value],
  ):
    self._computations, self._computation = computations, computations[name]
    self._parameters, self._known = parameters, dict[str, Value]()

  def root(self, index: int | None = None) -> Value:
    """Returns the value of the computation, or an element of it."""
    root = self._computation.root
    if index is not None and root.opcode == "tuple":
      return self.value(root.operands[index])
    return _element(self.value(root.name), index)

  def value(self, name: str) -> Value:
    """Returns what `name` is, as far as constants and parameters tell."""
    if name not in self._known:
      self._known[name] = self._value(self._computation.instructions[name])
    return self._known[name]

  def _value(self, one: hlo.Instruction) -> Value:
    if one.opcode == "get-tuple-element":
      return self._element(self._computation.operand(one, 0), int(one.attribute("index")))
    if one.opcode == "parameter":
      return self._parameters(int(one.literal))
    if one.opcode == "tuple":
      return tuple(self.value(name) for name in one.operands)
    if len(one.arrays) == 1 and one.arrays[0].dims:
      return None  # Not a scalar: no need to look further.
    if one.opcode == "constant":
      return _constant(one.literal)
    if one.opcode in ("fusion", "call"):
      return self._called(one).root()
    if one.opcode in _PASSING:
      return self.value(one.operands[0])
    if one.opcode in _OPERATIONS or one.opcode == "compare":
      values = [self.value(name) for name in one.operands]
      if not all(isinstance(value, int) for value in values):
        return None
      known = _OPERATIONS.get(one.opcode) or _COMPARISONS[one.attribute("direction")]
      return int(known(*values))
    return None

  def _element(self, source: hlo.Instruction, index: int) -> Value:
    if source.opcode == "tuple":
      return self.value(source.operands[index])
    if source.opcode in ("fusion", "call"):
      return self._called(source).root(index)
    return _element(self.value(source.name), index)

  def _called(self, one: hlo.Instruction) -> "_Frame":
    return _Frame(self._computations, one.calls[0], lambda index: self.value(one.operands[index]))


def _element(value: Value, index: int | None) -> Value:
  if index is None:
    return value
  return value[index] if isinstance(value, tuple) else None


def _constant(literal: str) -> int | None:
  if literal in ("true", "false"):
    return int(literal == "true")
  return int(literal) if re.fullmatch(r"-?\d+", literal) else None


class _Walk:
  """Follows a program from its entry and counts."""

  def __init__(self, computations: Mapping[str, hlo.Computation]):
    self._computations = computations
    self.counts: dict[str, int] = {}
    self.trips: dict[str, int | None] = {}
    self.fused: set[str] = set()

  def run(
    self, name: str, count: int, parameters: Callable[[int], Value] = lambda index: None,
    fused: bool = False,
  ) -> None:  # fmt: skip
    """Counts `count` runs of a computation and of all that it calls."""
    self.counts[name] = self.counts.get(name, 0) + count
    if fused:
      self.fused.add(name)
    frame = _Frame(self._computations, name, parameters)
    for one in self._computations[name]:
      if one.opcode == "while":
        self._loop(one, frame, count)
        continue
      for called in one.calls:
        self.run(called, count, fused=fused or one.opcode == "fusion")

  def _loop(self, one: hlo.Instruction, frame: _Frame, count: int) -> None:
    body, condition = one.calls[0], one.attribute("condition").strip("%")
    before = frame.value(one.operands[0])
    width = len(before) if isinstance(before, tuple) else 0
    marks = tuple(object() for _ in range(width))
    after = _Frame(self._computations, body, lambda _: marks)
    unchanging = tuple(
      value if after.root(index) is marks[index] else None
      for index, value in enumerate(before or ())
    )
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', one.attributes)
    trips = int(known.group(1)) if known else self._simulated(body, condition, before, unchanging)
    self.trips[one.name] = trips
    runs = count * (1 if trips is None else trips)
    self.run(condition, runs)
    self.run(body, runs, lambda _: unchanging)

  def _simulated(self, body: str, condition: str, before: Value, unchanging: tuple) -> int | None:
    """Runs a loop's counters, all else unknown; None if they don't end it."""
    state = before
    for trip in range(_LONGEST_LOOP):
      held = state
      go_on = _Frame(self._computations, condition, lambda _, held=held: held).root()
      if not isinstance(go_on, int):
        return None
      if not go_on:
        return trip
      frame = _Frame(self._computations, body, lambda _, held=held: held)
      state = tuple(
        value if unchanging[index] is not None else frame.root(index)
        for index, value in enumerate(held)
      )
    return None
