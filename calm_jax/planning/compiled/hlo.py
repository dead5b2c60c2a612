"""The text of a compiled program -> its computations and their instructions.

This parser exists because no maintained one does: PyPI has none for HLO, jaxlib's own
(`xla_client.hlo`) is private and cannot print what it has read, and the protobufs come
only with TensorFlow. XLA documents the text, and all backends print the same form.

Source: the grammar in xla/hlo/parser/hlo_parser.cc, read for jaxlib 0.10.2.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

# Bits of an element, where the name does not end in them.
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape.

  Attributes:
    space: memory space: 0 is the main memory (HBM), other numbers are on the chip, 1 is
      a TPU's vector memory (VMEM).
  """

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Bytes, without the padding of tiles."""
    bits = _BITS.get(self.dtype)
    if bits is None:
      bits = int(re.findall(r"^[a-z]+(\d+)", self.dtype)[0])
    return (self.size * bits + 7) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a computation.

  Attributes:
    arrays: arrays of its value; a tuple is flattened.
    operands: names of instructions of the same computation.
    literal: the text in brackets: a parameter's number, a constant's value, or operands.
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
    """Bytes of the value."""
    return sum(array.bytes for array in self.arrays)

  def attribute(self, name: str) -> str:
    """Returns the text of an attribute's value, braces included; "" if there is none."""
    match = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
    if not match:
      return ""
    rest = self.attributes[match.end() :]
    return rest[: _value_end(rest)]

  @property
  def calls(self) -> tuple[str, ...]:
    """Names of the computations that it runs, without a loop's condition."""
    names = _CALLS.get(self.opcode, ("calls", "called_computations"))
    values = " ".join(self.attribute(name) for name in names)
    return tuple(re.findall(r"[^\s,{}%]+", values))

  @property
  def target(self) -> str:
    """The target of a custom call; "" for other instructions."""
    return self.attribute("custom_call_target").strip('"')


# Attributes that name computations to run; scalar functions of reductions and sorts are left out.
_CALLS = {
  "while": ("body",),
  "call": ("to_apply",),
  "conditional": ("branch_computations", "true_computation", "false_computation"),
  "async-update": (),
  "async-done": (),
}


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in printed order."""

  name: str
  instructions: Mapping[str, Instruction]
  root: Instruction

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions.values())

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    """Parameters by number."""
    return {int(line.literal): line for line in self if line.opcode == "parameter"}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """The instructions that read each instruction, by its name."""
    users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
    for instruction in self:
      for name in dict.fromkeys(instruction.operands):
        users[name].append(instruction)
    return users

  def operand(self, instruction: Instruction, index: int) -> Instruction:
    """Returns operand number `index` of an instruction."""
    return self.instructions[instruction.operands[index]]


@dataclasses.dataclass(frozen=True)
class Text:
  """A program's computations.

  Attributes:
    header: the first line of the text.
  """

  header: str
  computations: Mapping[str, Computation]
  entry: Computation


def parse(text: str) -> Text:
  """Returns the program in the text of `compiled.as_text()`.

  Raises:
    ValueError: if the text holds no program.
  """
  computations, entry, header = {}, None, ""
  lines = iter(re.sub(r"/\*.*?\*/", "", text).splitlines())
  for line in lines:
    if line.startswith("HloModule") and not header:
      header = line
    match = re.match(r"(ENTRY )?%?([^\s(]+)[^=]*\(.*\) -> .*\{$", line)
    if match:
      computation = _computation(match.group(2), lines)
      computations[computation.name] = computation
      entry = computation if match.group(1) else entry
  if entry is None:
    raise ValueError(f"no ENTRY computation in these {len(text):,} characters of HLO")
  return Text(header, computations, entry)


_START = re.compile(r"\s+(ROOT )?%?([^\s=]+) = ")


def _computation(name: str, lines: Iterator[str]) -> Computation:
  """Reads a computation's instructions, up to its closing brace."""
  joined: list[str] = []
  for line in lines:
    if line == "}" or line.startswith("}, execution_thread"):
      break
    if _START.match(line):
      joined.append(line)
    else:  # A large constant's next line, or a kernel's metadata.
      joined[-1] += line
  instructions, root = {}, None
  for line in joined:
    instruction = _instruction(line)
    instructions[instruction.name] = instruction
    root = instruction if line.lstrip().startswith("ROOT ") else root
  assert root, f"{name} has no ROOT"
  return Computation(name, instructions, root)


def _instruction(line: str) -> Instruction:
  """Parses `name = shape opcode(operands), attributes`."""
  match = _START.match(line)
  assert match, line
  rest = line[match.end() :]
  end = _closing(rest, 0) if rest[0] == "(" else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode, _, rest = rest.partition("(")
  end = _closing("(" + rest, 0) - 2
  inside, attributes = rest[:end], rest[end + 1 :].lstrip(", ")
  operands: list[str] = []
  if opcode not in ("parameter", "constant", "iota"):
    operands = re.findall(r"%([^\s,()]+)", inside) if "%" in inside else _last_words(inside)
  return Instruction(match.group(2), opcode, _arrays(shape), tuple(operands), inside, attributes)


def _last_words(inside: str) -> list[str]:
  """Returns the operands' names from text without `%`: the last word of each."""
  return [
    part.split()[-1] for part in re.sub(r"[\[{(][^\]})]*[\]})]", "", inside).split(",") if part
  ]


def _closing(text: str, start: int) -> int:
  """Returns the index after the bracket that closes the one at `start`, or the text's length."""
  depth = 0
  for match in re.compile(r"[(){}]").finditer(text, start):
    depth += 1 if match.group() in "({" else -1
    if depth == 0:
      return match.end()
  return len(text)


def _value_end(text: str) -> int:
  """Returns where an attribute's value ends: at a comma outside brackets and quotes."""
  depth, in_quotes, previous = 0, False, ""
  for index, letter in enumerate(text):
    if letter == '"':
      in_quotes = in_quotes if previous == "\\" else not in_quotes
    elif not in_quotes and letter in "({[":
      depth += 1
    elif not in_quotes and letter in ")}]":
      depth -= 1
    elif not in_quotes and depth == 0 and letter == ",":
      return index
    previous = letter
  return len(text)


def _arrays(shape: str) -> tuple[Array, ...]:
  """Returns the arrays of a shape, such as `(bf16[8,4]{1,0:T(8,128)S(1)}, s32[])`."""
  matches = re.findall(r"([a-z]\w*)\[([^\]]*)\](\{[^}]*\})?", shape)
  return tuple(
    Array(
      dtype,
      tuple(int(size.strip("<= ")) for size in dims.split(",") if size.strip()),
      int((re.findall(r"S\((\d+)\)", layout) or [0])[0]),
    )
    for dtype, dims, layout in matches
  )
