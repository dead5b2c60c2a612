"""FLOPs, bytes and collectives of a step -> its time, and the resource that bounds it.

Nothing is measured: resources run at their published peaks, without latencies. `fastest`
assumes that everything overlaps, so only the slowest resource counts. `slowest` assumes
that nothing overlaps; it is not an upper bound, because real steps do not reach the peaks.

Source: How to Scale Your Model, section 1 (https://jax-ml.github.io/scaling-book/roofline).
"""

import dataclasses
from collections.abc import Iterable

from calm_jax.planning.compiled import collectives as collectives_lib
from calm_jax.planning.compiled import topologies

DAY = 24 * 60 * 60
RESOURCES = {
  "compute": "matrix products at the chip's bfloat16 peak",
  "memory": "HBM at its bandwidth",
  "interconnect": "ICI, rings over the torus axes that a group spans",
  "network": "DCN between slices",
}


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds that one step keeps each resource busy."""

  compute: float
  memory: float
  interconnect: float
  network: float

  @property
  def bound(self) -> str:
    """The resource that is busy longest."""
    return max(RESOURCES, key=lambda name: getattr(self, name))

  @property
  def fastest(self) -> float:
    """Seconds per step if everything overlaps."""
    return max(getattr(self, name) for name in RESOURCES)

  @property
  def slowest(self) -> float:
    """Seconds per step if nothing overlaps."""
    return sum(getattr(self, name) for name in RESOURCES)


def roofline(
  chip: topologies.Chip,
  flops: float,
  hbm_bytes: float,
  collectives: Iterable[collectives_lib.Collective],
) -> Roofline:
  """Returns the times of one device's work in a step; a device has its share of the chip."""
  seconds = {collectives_lib.ICI: 0.0, collectives_lib.DCN: 0.0}
  for collective in collectives:
    seconds[collective.network] += collective.total_seconds
  return Roofline(
    compute=flops / (chip.peak / chip.devices),
    memory=hbm_bytes / (chip.bandwidth / chip.devices),
    interconnect=seconds[collectives_lib.ICI],
    network=seconds[collectives_lib.DCN],
  )


@dataclasses.dataclass(frozen=True)
class Speed:
  """The speed of a run.

  Attributes:
    seconds: time of a step.
    mfu: the model's FLOPs, without recomputation, as a share of the peak.
    days: time of all steps; nothing else is included.
  """

  seconds: float
  tokens_per_second: float
  mfu: float
  days: float


def speed(
  topology: topologies.Topology, seconds: float, tokens: int, model_flops: float, steps: int
) -> Speed:
  """Returns the speed of a run whose steps take `seconds`.

  Args:
    tokens: tokens of a step, on all chips.
    model_flops: FLOPs of a step by an analytic count, on all chips.
    steps: steps of the run.
  """
  peak = topology.chips * topology.chip.peak
  return Speed(seconds, tokens / seconds, model_flops / (seconds * peak), steps * seconds / DAY)
