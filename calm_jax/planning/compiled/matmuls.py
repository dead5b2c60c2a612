"""A compiled program -> the FLOPs of its matrix products, with every iteration of loops.

A multiply-add is 2 FLOPs. XLA's own cost analysis counts a loop's body once (8 scanned
layers report an eighth). Counted here are dots, and the convolutions that the TPU compiler
turns dots into. Some of those have heads or examples as a spatial dimension, dilated so
that each position meets only its own kernel: only pairs that meet are counted.

The count is what the device computes: recomputation is included, and so are small products
that an analytic count leaves out. Not included are products that the compiler turned into
multiplications and sums (of vectors), and custom calls, which `kernels` lists.
"""

import functools
import math
import re
from collections.abc import Sequence

from calm_jax.planning.compiled import hlo, runs

# Custom calls without FLOPs.
_IDLE = {
  "AllocateBuffer",
  "AsyncCollectiveStart",
  "AsyncCollectiveDone",
  "ConcatBitcast",
  "MoveToHost",
  "MoveToDevice",
  "Sharding",
  "SPMDFullToShardShape",
  "SPMDShardToFullShape",
  "TODO(b/522284627)",
  "AssumeGatherIndicesInBound",
  "GatherScatterIndicesBitpacked",
  "annotate_device_placement",
  "ForceDelay",
  "SliceId",
  "ZeroCrop",
  "X64Combine",
  "X64SplitHigh",
  "X64SplitLow",
}


def flops(module: runs.Module) -> float:
  """Returns the FLOPs of one execution on one device."""
  return float(
    sum(
      count * COUNTS[instruction.opcode](computation, instruction)
      for computation, instruction, count in module.running()
      if instruction.opcode in COUNTS
    )
  )


def kernels(module: runs.Module) -> dict[str, int]:
  """Returns runs of each custom call, by name; their FLOPs are not in `flops`.

  A Pallas kernel has its own name, other calls have their target's.
  """
  counts: dict[str, int] = {}
  for _, instruction, count in module.running():
    if instruction.opcode == "custom-call" and instruction.target not in _IDLE:
      is_pallas = instruction.target == "tpu_custom_call"
      name = re.sub(r"[.\d]+$", "", instruction.name) if is_pallas else instruction.target
      counts[name] = counts.get(name, 0) + count
  return counts


def _dot(computation: hlo.Computation, dot: hlo.Instruction) -> int:
  left = computation.operand(dot, 0).arrays[0].dims
  contracted = math.prod(left[axis] for axis in _numbers(dot.attribute("lhs_contracting_dims")))
  return 2 * dot.arrays[0].size * contracted


def _convolution(computation: hlo.Computation, convolution: hlo.Instruction) -> int:
  inputs, kernel = (computation.operand(convolution, index).arrays[0].dims for index in (0, 1))
  labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", convolution.attribute("dim_labels"))
  assert labels, convolution
  input_axes, kernel_axes, output_axes = (labels.group(group) for group in (1, 2, 3))
  output = convolution.arrays[0].dims
  window = convolution.attribute("window").strip("{}")
  pairs = 1
  for axis in filter(str.isdigit, input_axes):
    pairs *= _meeting(
      inputs[input_axes.index(axis)],
      kernel[kernel_axes.index(axis)],
      output[output_axes.index(axis)],
      *_window(window, int(axis)),
    )
  batch = inputs[input_axes.index("b")] // int(convolution.attribute("batch_group_count") or 1)
  features = kernel[kernel_axes.index("i")] * output[output_axes.index("f")]
  return 2 * batch * features * pairs


COUNTS = {"dot": _dot, "convolution": _convolution}


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"-?\d+", text)]


def _window(window: str, axis: int) -> Sequence[int]:
  """Returns an axis's stride, padding before, and dilations of the input and the kernel."""

  def value(name: str, default: str) -> str:
    match = re.search(rf"\b{name}=(\S+)", window)
    return match.group(1).split("x")[axis] if match else default

  padding = value("pad", "0_0").split("_")[0]
  dilations = [int(value(name, "1")) for name in ("lhs_dilate", "rhs_dilate")]
  return int(value("stride", "1")), int(padding), *dilations


@functools.lru_cache(maxsize=4096)
def _meeting(
  inputs: int, kernel: int, outputs: int, stride: int, pad_before: int, dilate: int, spread: int
) -> int:
  """Returns how many pairs of an output and a kernel position meet an element of the input."""
  last = (inputs - 1) * dilate
  pairs = 0
  for position in range(kernel):
    start = position * spread - pad_before
    if dilate == 1:
      first = max(0, -(start // stride))
      pairs += max(0, min(outputs - 1, (last - start) // stride) - first + 1)
    else:
      positions = range(start, start + outputs * stride, stride)
      pairs += sum(1 for x in positions if 0 <= x <= last and x % dilate == 0)
  return pairs
