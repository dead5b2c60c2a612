"""A compiled program -> the FLOPs of its matrix products, loops multiplied out.

A multiply-add is two. XLA's own cost analysis counts a loop's body once (8 scanned
layers report an eighth), so this is counted from the program: dots, and the
convolutions that the TPU compiler turns them into. Those run heads or examples as
a spatial dimension, dilated so that each position meets its own kernel alone:
only pairs that meet are counted.

It is what the device does: recomputation counts, and so does what a model's
analytic count (`models/flops.py`) leaves out as small. Not seen are products that
the compiler turned into multiplications and sums (a vector's) and kernels of our
own or of a library (custom calls), which `kernels` names.
"""

import functools
import math
import re
from collections.abc import Sequence

from calm_jax.planning import hlo, runs

# Custom calls that compute nothing.
_IDLE = {
  "AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast",
  "MoveToHost", "MoveToDevice", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape",
  "TODO(b/522284627)", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked",
  "annotate_device_placement", "ForceDelay", "SliceId", "ZeroCrop",
  "X64Combine", "X64SplitHigh", "X64SplitLow",
}  # fmt: skip


def flops(module: runs.Module) -> float:
  """Returns the FLOPs of one run on one device."""
  return float(
    sum(
      count * COUNTS[one.opcode](computation, one)
      for computation, one, count in module.running()
      if one.opcode in COUNTS
    )
  )


def kernels(module: runs.Module) -> dict[str, int]:
  """Returns how often each custom call runs, whose FLOPs are not in `flops`.

  A Pallas kernel goes by its own name, all others by what they call.
  """
  found: dict[str, int] = {}
  for _, one, count in module.running():
    if one.opcode == "custom-call" and one.target not in _IDLE:
      pallas = one.target == "tpu_custom_call"
      name = re.sub(r"[.\d]+$", "", one.name) if pallas else one.target
      found[name] = found.get(name, 0) + count
  return found


def _dot(computation: hlo.Computation, one: hlo.Instruction) -> int:
  left = computation.operand(one, 0).arrays[0].dims
  contracted = math.prod(left[axis] for axis in _numbers(one.attribute("lhs_contracting_dims")))
  return 2 * one.arrays[0].size * contracted


def _convolution(computation: hlo.Computation, one: hlo.Instruction) -> int:
  inputs, kernel = (computation.operand(one, index).arrays[0].dims for index in (0, 1))
  labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", one.attribute("dim_labels"))
  assert labels, one
  of_input, of_kernel, of_output = (labels.group(group) for group in (1, 2, 3))
  output = one.arrays[0].dims
  window = one.attribute("window").strip("{}")
  pairs = 1
  for axis in filter(str.isdigit, of_input):
    pairs *= _meeting(
      inputs[of_input.index(axis)],
      kernel[of_kernel.index(axis)],
      output[of_output.index(axis)],
      *_window(window, int(axis)),
    )
  batch = inputs[of_input.index("b")] // int(one.attribute("batch_group_count") or 1)
  features = kernel[of_kernel.index("i")] * output[of_output.index("f")]
  return 2 * batch * features * pairs


COUNTS = {"dot": _dot, "convolution": _convolution}


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"-?\d+", text)]


def _window(window: str, axis: int) -> Sequence[int]:
  """Returns (stride, padding before, dilation of the input, of the kernel) along an axis."""

  def of(name: str, default: str) -> str:
    found = re.search(rf"\b{name}=(\S+)", window)
    return found.group(1).split("x")[axis] if found else default

  padding = of("pad", "0_0").split("_")[0]
  return (
    int(of("stride", "1")), int(padding), int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))
  )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _meeting(
  inputs: int, kernel: int, outputs: int, stride: int, before: int, dilate: int, spread: int
) -> int:
  """Returns how many pairs of an output and a kernel position meet an element of the input."""
  last = (inputs - 1) * dilate
  found = 0
  for position in range(kernel):
    start = position * spread - before
    if dilate == 1:
      first = max(0, -(start // stride))
      found += max(0, min(outputs - 1, (last - start) // stride) - first + 1)
    else:
      places = range(start, start + outputs * stride, stride)
      found += sum(1 for place in places if 0 <= place <= last and place % dilate == 0)
  return found
