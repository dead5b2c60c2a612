"""The text of a compiled program -> its instructions, and how often each runs.

XLA writes a loop's body once and its cost analysis counts it once, so whatever
is summed over a program with scanned layers has to know how often they run.

Written by hand since nothing kept up offers this: PyPI has no reader of HLO,
jaxlib's own (`xla_client.hlo`) is private and does not print what it read, and
the protobufs come only with TensorFlow. The text is what XLA documents for
people and what every backend prints alike.

Source: the grammar in xla/hlo/parser/hlo_parser.cc, read for jaxlib 0.10.2.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Bits of an element; a token or a flag takes no memory.
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}
_LONGEST_LOOP = 100_000


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape.

  Attributes:
    space: 0 is the main memory (HBM); other numbers are a chip's own, 1 the vector
      memory of a TPU (VMEM).
  """

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def size(self) -> int:
    """Elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Without the padding of its tiles."""
    bits = _BITS.get(self.dtype)
    if bits is None:
      bits = int(re.findall(r"^[a-z]+(\d+)", self.dtype)[0])
    return (self.size * bits + 7) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line.

  Attributes:
    arrays: of its value, a tuple's one after the other.
    operands: names of instructions of the same computation.
    literal: what stands in the brackets, where that is no operand.
    attributes: the rest of the line.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  literal: str
  attributes: str

  @property
  def bytes(self) -> int:
    """Of the value."""
    return sum(array.bytes for array in self.arrays)

  def attribute(self, name: str) -> str:
    """Returns the value of an attribute as it is written, braces included, or ""."""
    found = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
    if not found:
      return ""
    rest = self.attributes[found.end() :]
    return rest[: _value_end(rest)]

  @property
  def calls(self) -> tuple[str, ...]:
    """The computations that it runs, a loop's condition aside."""
    names = _CALLS.get(self.opcode, ("calls", "called_computations"))
    written = " ".join(self.attribute(name) for name in names)
    return tuple(re.findall(r"[^\s,{}%]+", written))

  @property
  def target(self) -> str:
    """What a custom call calls."""
    return self.attribute("custom_call_target").strip('"')


# What runs as part of the program; the scalar functions of a reduction or a sort do not count.
_CALLS = {
  "while": ("body",),
  "call": ("to_apply",),
  "conditional": ("branch_computations", "true_computation", "false_computation"),
  "async-update": (),
  "async-done": (),
}


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in the order that they are printed in."""

  name: str
  instructions: Mapping[str, Instruction]
  root: Instruction

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions.values())

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    """By number."""
    return {int(one.literal): one for one in self if one.opcode == "parameter"}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """The instructions that read each, by its name."""
    found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
    for one in self:
      for name in dict.fromkeys(one.operands):
        found[name].append(one)
    return found

  def operand(self, one: Instruction, index: int) -> Instruction:
    """Returns the instruction that is operand `index` of `one`."""
    return self.instructions[one.operands[index]]


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
  computations: Mapping[str, Computation]
  entry: Computation
  counts: Mapping[str, int]
  trips: Mapping[str, int | None]
  fused: frozenset[str]

  def running(self) -> Iterator[tuple[Computation, Instruction, int]]:
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
  computations, entry, header = {}, None, ""
  lines = iter(re.sub(r"/\*.*?\*/", "", text).splitlines())
  for line in lines:
    if line.startswith("HloModule") and not header:
      header = line
    found = re.match(r"(ENTRY )?%?([^\s(]+)[^=]*\(.*\) -> .*\{$", line)
    if found:
      computation = _computation(found.group(2), lines)
      computations[computation.name] = computation
      entry = computation if found.group(1) else entry
  if entry is None:
    raise ValueError(f"no ENTRY computation in the {len(text):,} characters of this program")
  walk = _Walk(computations)
  walk.run(entry.name, 1)
  return Module(header, computations, entry, walk.counts, walk.trips, frozenset(walk.fused))


_BEGINS = re.compile(r"\s+(ROOT )?%?([^\s=]+) = ")


def _computation(name: str, lines: Iterator[str]) -> Computation:
  written: list[str] = []
  for line in lines:
    if line == "}" or line.startswith("}, execution_thread"):
      break
    if _BEGINS.match(line):
      written.append(line)
    else:  # Of a large constant, or of a kernel's metadata.
      written[-1] += line
  instructions, root = {}, None
  for line in written:
    one = _instruction(line)
    instructions[one.name] = one
    root = one if line.lstrip().startswith("ROOT ") else root
  assert root, f"{name} has no ROOT"
  return Computation(name, instructions, root)


def _instruction(line: str) -> Instruction:
  found = _BEGINS.match(line)
  assert found, line
  rest = line[found.end() :]
  end = _closing(rest, 0) if rest[0] == "(" else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode, _, rest = rest.partition("(")
  end = _closing("(" + rest, 0) - 2
  inside, attributes = rest[:end], rest[end + 1 :].lstrip(", ")
  operands: list[str] = []
  if opcode not in ("parameter", "constant", "iota"):
    operands = re.findall(r"%([^\s,()]+)", inside) if "%" in inside else _last_words(inside)
  return Instruction(found.group(2), opcode, _arrays(shape), tuple(operands), inside, attributes)


def _last_words(inside: str) -> list[str]:
  return [
    part.split()[-1] for part in re.sub(r"[\[{(][^\]})]*[\]})]", "", inside).split(",") if part
  ]


def _closing(text: str, start: int) -> int:
  """Returns the place after the bracket that closes the one at `start`, or the end."""
  depth = 0
  for found in re.compile(r"[(){}]").finditer(text, start):
    depth += 1 if found.group() in "({" else -1
    if depth == 0:
      return found.end()
  return len(text)


def _value_end(text: str) -> int:
  """Returns where an attribute's value ends: at a comma outside of brackets and quotes."""
  depth, quoted, letter = 0, False, ""
  for place, letter_now in enumerate(text):
    before, letter = letter, letter_now
    if letter == '"':
      quoted = quoted if before == "\\" else not quoted
    elif not quoted and letter in "({[":
      depth += 1
    elif not quoted and letter in ")}]":
      depth -= 1
    elif not quoted and depth == 0 and letter == ",":
      return place
  return len(text)


def _arrays(shape: str) -> tuple[Array, ...]:
  found = re.findall(r"([a-z]\w*)\[([^\]]*)\](\{[^}]*\})?", shape)
  return tuple(
    Array(
      dtype,
      tuple(int(size.strip("<= ")) for size in dims.split(",") if size.strip()),
      int((re.findall(r"S\((\d+)\)", layout) or [0])[0]),
    )
    for dtype, dims, layout in found
  )


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
    computations: Mapping[str, Computation],
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

  def _value(self, one: Instruction) -> Value:
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

  def _element(self, source: Instruction, index: int) -> Value:
    if source.opcode == "tuple":
      return self.value(source.operands[index])
    if source.opcode in ("fusion", "call"):
      return self._called(source).root(index)
    return _element(self.value(source.name), index)

  def _called(self, one: Instruction) -> "_Frame":
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

  def __init__(self, computations: Mapping[str, Computation]):
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

  def _loop(self, one: Instruction, frame: _Frame, count: int) -> None:
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
