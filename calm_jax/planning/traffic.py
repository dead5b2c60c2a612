"""A compiled program -> the bytes that it moves to and from main memory (HBM).

What every instruction reads and writes, loops multiplied out. A fusion reads its
operands and writes its value, and nothing between; where it reads a slice of an
operand or updates a slice in place, the slice alone counts. Arrays that the
compiler keeps in a chip's own memory (`S(1)` on a TPU) are free: so this is less
than XLA's "bytes accessed", and that counts a loop's body once besides.
Tile padding is left out, and a kernel of our own counts as reading each operand once.
"""

import itertools
from collections.abc import Iterable

from calm_jax.planning import hlo, runs

_FREE = {
  "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call",
  "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update",
  "add-dependency", "send", "recv", "iota",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}
# The operand that is updated in place, and the one that it is updated with.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AsyncCollectiveDone"}
_VIEWS = {"bitcast", "reshape"}


def hbm_bytes(module: runs.Module) -> int:
  """Returns the bytes that one run moves on one device, reading and writing."""
  total = 0
  for computation, one, count in module.running():
    if computation.name not in module.fused:
      total += count * _moved(module, computation, one)
  return total


def _moved(module: runs.Module, computation: hlo.Computation, one: hlo.Instruction) -> int:
  if one.opcode in _FREE or one.opcode.endswith("-done") or one.target in _FREE_CALLS:
    return 0
  if one.opcode == "fusion":
    called = module.computations[one.calls[0]]
    read = (
      _read(module, called, parameter.name)
      for number, parameter in called.parameters.items()
      if _in_hbm(computation.operand(one, number).arrays)
    )
    return sum(read) + _written(module, called, one.arrays)
  if one.opcode in ("copy-start", "slice-start"):
    # Their values are (copy, source, context) and ((source), copy, context).
    copy = one.arrays[0 if one.opcode == "copy-start" else 1]
    source = computation.operand(one, 0).arrays[0]
    return copy.bytes * ((copy.space == 0) + (source.space == 0))
  if one.opcode in _SLICES:
    source = computation.operand(one, 0).arrays
    return one.bytes * (_in_hbm(one.arrays) + _in_hbm(source))
  if one.opcode in _UPDATES:
    update = computation.operand(one, _UPDATES[one.opcode])
    return update.bytes * (_in_hbm(update.arrays) + _in_hbm(one.arrays))
  operands = itertools.chain(*(computation.instructions[name].arrays for name in one.operands))
  return _bytes(operands) + _bytes(one.arrays)


def _bytes(arrays: Iterable[hlo.Array]) -> int:
  return sum(array.bytes for array in arrays if array.space == 0)


def _in_hbm(arrays: Iterable[hlo.Array]) -> bool:
  return any(array.space == 0 for array in arrays)


def _read(module: runs.Module, computation: hlo.Computation, name: str) -> int:
  """Returns what a fused computation reads of its value `name`, a parameter or a view of one."""
  whole, total = computation.instructions[name].bytes, 0
  for user in computation.users[name]:
    if user.opcode in _SLICES and user.operands[0] == name:
      total += user.bytes
    elif user.opcode in _UPDATES and user.operands[0] == name:
      continue  # Updated in place.
    elif user.opcode == "tuple":
      continue  # Handed on as it is.
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
      return whole
  return min(total, whole)


def _written(module: runs.Module, called: hlo.Computation, arrays: tuple[hlo.Array, ...]) -> int:
  root = called.root
  if root.opcode == "tuple" and len(root.operands) == len(arrays):
    parts = zip((called.instructions[name] for name in root.operands), arrays, strict=True)
  elif len(arrays) == 1:
    parts = [(root, arrays[0])]
  else:
    return _bytes(arrays)
  return sum(_written_part(module, called, one, array) for one, array in parts)


def _written_part(
  module: runs.Module, called: hlo.Computation, one: hlo.Instruction, array: hlo.Array
) -> int:
  if array.space != 0 or one.opcode in ("parameter", "get-tuple-element"):
    return 0  # Kept in the chip, or handed on as it is.
  if one.opcode in _VIEWS:
    return _written_part(module, called, called.operand(one, 0), array)
  if one.opcode in _UPDATES:
    return called.operand(one, _UPDATES[one.opcode]).bytes
  if one.opcode == "fusion":
    return _written(module, module.computations[one.calls[0]], (array,))
  return array.bytes
