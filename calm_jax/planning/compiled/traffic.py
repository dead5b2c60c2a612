"""A compiled program -> the bytes that it moves to and from main memory (HBM).

The sum of what every instruction reads and writes, with every iteration of loops. A fusion
reads its operands and writes its value, and nothing in between; where it reads a slice of
an operand or updates a slice in place, only the slice counts. Arrays that the compiler
keeps on the chip (`S(1)` on a TPU) are free. XLA's "bytes accessed" counts those too, and
a loop's body once. Tile padding is left out; a Pallas kernel reads each operand once.
"""

import itertools
from collections.abc import Iterable

from calm_jax.planning.compiled import hlo, runs

_FREE = {
  "parameter",
  "constant",
  "get-tuple-element",
  "tuple",
  "bitcast",
  "while",
  "conditional",
  "call",
  "after-all",
  "partition-id",
  "replica-id",
  "opt-barrier",
  "async-start",
  "async-update",
  "add-dependency",
  "send",
  "recv",
  "iota",
}
_SLICES = {"dynamic-slice", "slice", "gather"}
# Opcodes that update operand 0 in place -> number of the operand with the update.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AsyncCollectiveDone"}
_VIEWS = {"bitcast", "reshape"}


def hbm_bytes(module: runs.Module) -> int:
  """Returns the bytes that one execution reads and writes on one device."""
  total = 0
  for computation, instruction, count in module.running():
    if computation.name not in module.fused:
      total += count * _moved(module, computation, instruction)
  return total


def _moved(module: runs.Module, computation: hlo.Computation, instruction: hlo.Instruction) -> int:
  """Returns the bytes that one instruction reads and writes."""
  opcode, arrays = instruction.opcode, instruction.arrays
  if opcode in _FREE or opcode.endswith("-done") or instruction.target in _FREE_CALLS:
    return 0
  if opcode == "fusion":
    called = module.computations[instruction.calls[0]]
    read = (
      _read(module, called, parameter.name)
      for number, parameter in called.parameters.items()
      if _in_hbm(computation.operand(instruction, number).arrays)
    )
    return sum(read) + _written(module, called, arrays)
  if opcode in ("copy-start", "slice-start"):
    # Their values are (copy, source, context) and ((source), copy, context).
    copy = arrays[0 if opcode == "copy-start" else 1]
    source = computation.operand(instruction, 0).arrays[0]
    return copy.bytes * ((copy.space == 0) + (source.space == 0))
  if opcode in _SLICES:
    source = computation.operand(instruction, 0).arrays
    return instruction.bytes * (_in_hbm(arrays) + _in_hbm(source))
  if opcode in _UPDATES:
    update = computation.operand(instruction, _UPDATES[opcode])
    return update.bytes * (_in_hbm(update.arrays) + _in_hbm(arrays))
  operands = (computation.instructions[name].arrays for name in instruction.operands)
  return _bytes(itertools.chain(*operands)) + _bytes(arrays)


def _bytes(arrays: Iterable[hlo.Array]) -> int:
  return sum(array.bytes for array in arrays if array.space == 0)


def _in_hbm(arrays: Iterable[hlo.Array]) -> bool:
  return any(array.space == 0 for array in arrays)


def _read(module: runs.Module, computation: hlo.Computation, name: str) -> int:
  """Returns the bytes that a fused computation reads of a parameter, or of a view of one."""
  full_size, total = computation.instructions[name].bytes, 0
  for user in computation.users[name]:
    if user.opcode in _SLICES and user.operands[0] == name:
      total += user.bytes
    elif user.opcode in _UPDATES and user.operands[0] == name:
      continue  # Updated in place.
    elif user.opcode == "tuple":
      continue  # Passed on unchanged.
    elif user.opcode in _VIEWS:
      total += _read(module, computation, user.name)
    elif user.opcode == "fusion":
      called = module.computations[user.calls[0]]
      total += sum(
        _read(module, called, called.parameters[number].name)
        for number, operand in enumerate(user.operands)
        if operand == name
      )
    else:
      return full_size
  return min(total, full_size)


def _written(module: runs.Module, called: hlo.Computation, arrays: tuple[hlo.Array, ...]) -> int:
  """Returns the bytes that a fusion writes into its value's arrays."""
  root = called.root
  if root.opcode == "tuple" and len(root.operands) == len(arrays):
    parts = zip((called.instructions[name] for name in root.operands), arrays, strict=True)
  elif len(arrays) == 1:
    parts = [(root, arrays[0])]
  else:
    return _bytes(arrays)
  return sum(_written_part(module, called, part, array) for part, array in parts)


def _written_part(
  module: runs.Module, called: hlo.Computation, part: hlo.Instruction, array: hlo.Array
) -> int:
  if array.space != 0 or part.opcode in ("parameter", "get-tuple-element"):
    return 0  # Kept on the chip, or passed on unchanged.
  if part.opcode in _VIEWS:
    return _written_part(module, called, called.operand(part, 0), array)
  if part.opcode in _UPDATES:
    return called.operand(part, _UPDATES[part.opcode]).bytes
  if part.opcode == "fusion":
    return _written(module, module.computations[part.calls[0]], (array,))
  return array.bytes
