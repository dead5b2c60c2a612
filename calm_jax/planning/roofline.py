"""FLOPs, bytes and collectives of a step -> its time, and what bounds it.

No measurement: published peaks, reached at all times, and no latencies. Two ends
are told. `fastest` takes everything to overlap, so the slowest resource alone
counts; `slowest` takes nothing to overlap, and is no upper bound of a real step,
which does not reach the peaks.

Source: How to Scale Your Model, section 1 (https://jax-ml.github.io/scaling-book/roofline).
"""

import dataclasses
from collections.abc import Iterable

from calm_jax.planning import collectives as collectives_lib
from calm_jax.planning import topologies

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
    """Seconds a step if all overlaps."""
    return max(getattr(self, name) for name in RESOURCES)

  @property
  def slowest(self) -> float:
    """Seconds a step if nothing overlaps."""
    return sum(getattr(self, name) for name in RESOURCES)


def roofline(
  chip: topologies.Chip,
  flops: float,
  hbm_bytes: float,
  collectives: Iterable[collectives_lib.Collective],
) -> Roofline:
  """Returns the times of what one device does in a step: it has its part of the chip."""
  seconds = {collectives_lib.ICI: 0.0, collectives_lib.DCN: 0.0}
  for one in collectives:
    seconds[one.network] += one.total_seconds
  return Roofline(
    compute=flops / (chip.peak / chip.devices),
    memory=hbm_bytes / (chip.bandwidth / chip.devices),
    interconnect=seconds[collectives_lib.ICI],
    network=seconds[collectives_lib.DCN],
  )


@dataclasses.dataclass(frozen=True)
class Speed:
  """What a time a step means for a run.

  Attributes:
    mfu: the model's FLOPs, recomputation left out, as a share of the peak.
    days: of all steps of the run, nothing else counted.
  """

  seconds: float
  tokens_per_second: float
  mfu: float
  days: float


def speed(
  topology: topologies.Topology, seconds: float, tokens: int, model_flops: float, steps: int
) -> Speed:
  """Returns the speed of steps of so many seconds.

  Args:
    tokens: of a step, on all chips.
    model_flops: of a step, on all chips, as `models/flops.py` counts them.
    steps: of the run.
  """
  peak = topology.chips * topology.chip.peak
  return Speed(seconds, tokens / seconds, model_flops / (seconds * peak), steps * seconds / DAY)
