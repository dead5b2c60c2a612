"""A program's text -> how often each computation runs.

A loop's body is in the text once, and XLA's cost analysis counts it once, so sums over a
program with scanned layers need the trip counts. CPU and GPU programs state them
(`known_trip_count`). TPU programs do not, and their loops may be peeled: here the loop's
counters are simulated until its condition fails.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from calm_jax.planning.compiled import hlo

_LONGEST_LOOP = 100_000


@dataclasses.dataclass(frozen=True)
class Module(hlo.Text):
  """A program, and how often its computations run.

  Attributes:
    counts: runs of each computation that runs. All branches of a conditional count.
    trips: iterations of each loop, by its name. None if they can't be known: `counts`
      then has one.
    fused: names of computations inside fusions.
  """

  counts: Mapping[str, int]
  trips: Mapping[str, int | None]
  fused: frozenset[str]

  def running(self) -> Iterator[tuple[hlo.Computation, hlo.Instruction, int]]:
    """Yields every instruction that runs, with its computation and its number of runs."""
    for name, count in self.counts.items():
      for instruction in self.computations[name]:
        yield self.computations[name], instruction, count

  @property
  def partitions(self) -> int:
    """Devices that the program is written for: those of one slice."""
    match = re.search(r"num_partitions=(\d+)", self.header)
    return int(match.group(1)) if match else 1


def read(text: str) -> Module:
  """Returns the program in the text of `compiled.as_text()`, with the runs of its computations.

  Raises:
    ValueError: if the text holds no program.
  """
  parsed = hlo.parse(text)
  walk = _Walk(parsed.computations)
  walk.run(parsed.entry.name, 1)
  return Module(**vars(parsed), counts=walk.counts, trips=walk.trips, fused=frozenset(walk.fused))


# A scalar integer, a tuple of values, or None for anything unknown.
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
  """Evaluates a computation's scalar integers, given its parameters' values."""

  def __init__(
    self,
    computations: Mapping[str, hlo.Computation],
    name: str,
    parameters: Callable[[int], Value],
  ):
    self._computations, self._computation = computations, computations[name]
    self._parameters, self._values = parameters, dict[str, Value]()

  def root(self, index: int | None = None) -> Value:
    """Returns the computation's value, or element `index` of it."""
    root = self._computation.root
    if index is not None and root.opcode == "tuple":
      return self.value(root.operands[index])
    return _element(self.value(root.name), index)

  def value(self, name: str) -> Value:
    """Returns the value of instruction `name`, None if constants and parameters don't fix it."""
    if name not in self._values:
      self._values[name] = self._evaluated(self._computation.instructions[name])
    return self._values[name]

  def _evaluated(self, instruction: hlo.Instruction) -> Value:
    opcode = instruction.opcode
    if opcode == "get-tuple-element":
      source = self._computation.operand(instruction, 0)
      return self._element(source, int(instruction.attribute("index")))
    if opcode == "parameter":
      return self._parameters(int(instruction.literal))
    if opcode == "tuple":
      return tuple(self.value(name) for name in instruction.operands)
    if len(instruction.arrays) == 1 and instruction.arrays[0].dims:
      return None  # No scalar.
    if opcode == "constant":
      return _constant(instruction.literal)
    if opcode in ("fusion", "call"):
      return self._called(instruction).root()
    if opcode in _PASSING:
      return self.value(instruction.operands[0])
    if opcode in _OPERATIONS or opcode == "compare":
      values = [self.value(name) for name in instruction.operands]
      if not all(isinstance(value, int) for value in values):
        return None
      function = _OPERATIONS.get(opcode) or _COMPARISONS[instruction.attribute("direction")]
      return int(function(*values))
    return None

  def _element(self, source: hlo.Instruction, index: int) -> Value:
    if source.opcode == "tuple":
      return self.value(source.operands[index])
    if source.opcode in ("fusion", "call"):
      return self._called(source).root(index)
    return _element(self.value(source.name), index)

  def _called(self, instruction: hlo.Instruction) -> "_Frame":
    def parameters(index: int) -> Value:
      return self.value(instruction.operands[index])

    return _Frame(self._computations, instruction.calls[0], parameters)


def _element(value: Value, index: int | None) -> Value:
  if index is None:
    return value
  return value[index] if isinstance(value, tuple) else None


def _constant(literal: str) -> int | None:
  if literal in ("true", "false"):
    return int(literal == "true")
  return int(literal) if re.fullmatch(r"-?\d+", literal) else None


class _Walk:
  """Walks a program from its entry and counts runs."""

  def __init__(self, computations: Mapping[str, hlo.Computation]):
    self._computations = computations
    self.counts: dict[str, int] = {}
    self.trips: dict[str, int | None] = {}
    self.fused: set[str] = set()

  def run(
    self,
    name: str,
    count: int,
    parameters: Callable[[int], Value] = lambda index: None,
    fused: bool = False,
  ) -> None:
    """Counts `count` runs of a computation, and those of all that it calls."""
    self.counts[name] = self.counts.get(name, 0) + count
    if fused:
      self.fused.add(name)
    frame = _Frame(self._computations, name, parameters)
    for instruction in self._computations[name]:
      if instruction.opcode == "while":
        self._loop(instruction, frame, count)
        continue
      for called in instruction.calls:
        self.run(called, count, fused=fused or instruction.opcode == "fusion")

  def _loop(self, loop: hlo.Instruction, frame: _Frame, count: int) -> None:
    body, condition = loop.calls[0], loop.attribute("condition").strip("%")
    initial = frame.value(loop.operands[0])
    width = len(initial) if isinstance(initial, tuple) else 0
    markers = tuple(object() for _ in range(width))
    body_frame = _Frame(self._computations, body, lambda _: markers)
    constants = tuple(
      value if body_frame.root(index) is markers[index] else None
      for index, value in enumerate(initial or ())
    )
    trip_count = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    trips = (
      int(trip_count.group(1))
      if trip_count
      else self._simulated(body, condition, initial, constants)
    )
    self.trips[loop.name] = trips
    runs = count * (1 if trips is None else trips)
    self.run(condition, runs)
    self.run(body, runs, lambda _: constants)

  def _simulated(self, body: str, condition: str, initial: Value, constants: tuple) -> int | None:
    """Returns a loop's iterations from its counters alone; None if they don't end it."""
    state = initial
    for trip in range(_LONGEST_LOOP):
      carried = state
      is_true = _Frame(self._computations, condition, lambda _, carried=carried: carried).root()
      if not isinstance(is_true, int):
        return None
      if not is_true:
        return trip
      frame = _Frame(self._computations, body, lambda _, carried=carried: carried)
      state = tuple(
        value if constants[index] is not None else frame.root(index)
        for index, value in enumerate(carried)
      )
    return None
