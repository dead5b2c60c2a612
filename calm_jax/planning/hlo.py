"""The text of a compiled program -> its computations and their instructions.

Written by hand since nothing kept up offers this: PyPI has no reader of HLO,
jaxlib's own (`xla_client.hlo`) is private and does not print what it read, and
the protobufs come only with TensorFlow. The text is what XLA documents for
people and what every backend prints alike.

Source: the grammar in xla/hlo/parser/hlo_parser.cc, read for jaxlib 0.10.2.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

# Bits of an element; a token or a flag takes no memory.
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}


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
class Text:
  """A program as it is printed.

  Attributes:
    header: its first line.
  """

  header: str
  computations: Mapping[str, Computation]
  entry: Computation


def parse(text: str) -> Text:
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
  return Text(header, computations, entry)


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
