"""A program for a topology -> the plan: what it holds, sends and takes, told and as JSON."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from calm_jax import files
from calm_jax.planning import collectives as collectives_lib
from calm_jax.planning import matmuls, runs, topologies, traffic
from calm_jax.planning import memory as memory_lib
from calm_jax.planning import program as program_lib
from calm_jax.planning import roofline as roofline_lib

GIB = memory_lib.GIB


@dataclasses.dataclass(frozen=True)
class Facts:
  """What is known of a step besides its program.

  Attributes:
    name: of the run, as its config is named.
    parameters: that are trained, on all chips.
    state_bytes: of the train state on one device.
    state_arrays: of the train state.
    tokens: of a step, on all chips.
    model_flops: of a step, on all chips, by `models/flops.py`.
    steps: of the run.
    kernel_flops: of a step, on all chips, in kernels of our own (attention), which the
      program does not tell. padding_flops: what those compute besides, in blocks and lanes
      that they fill up.
    fsdp: devices that the state is cut over. examples: of a device, in one part of a
      step. accumulation: parts of a step. recomputes_all: whether the backward pass
      keeps nothing of a layer but its input. choices: settings of the layout, for people.
  """

  name: str
  parameters: int
  state_bytes: int
  state_arrays: int
  tokens: int
  model_flops: float
  steps: int
  kernel_flops: float = 0.0
  padding_flops: float = 0.0
  fsdp: int = 1
  examples: int = 1
  accumulation: int = 1
  recomputes_all: bool = False
  choices: Mapping[str, str | int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
  """All that is told. Bytes and FLOPs are a device's; 7x has two devices a chip.

  Attributes:
    program_flops: of the matrix products that the program runs, recomputation included,
      and of `facts.kernel_flops`, without `facts.padding_flops`, which take time all the same.
    kernels: custom calls whose FLOPs the program does not tell, and how often each runs.
    unknown_loops: loops whose length the program does not state, counted once.
    rematerialized: values that XLA computes again, unasked, where memory is short: a
      program near its limit has more FLOPs than the model and its recomputation.
    donated: whether every array of the state takes its predecessor's place.
  """

  facts: Facts
  topology: topologies.Topology
  memory: memory_lib.Memory
  overflow: memory_lib.Overflow | None
  largest: tuple[memory_lib.Buffer, ...]
  collectives: tuple[collectives_lib.Collective, ...]
  program_flops: float
  hbm_bytes: int
  kernels: Mapping[str, int]
  unknown_loops: tuple[str, ...]
  rematerialized: int
  donated: bool
  roofline: roofline_lib.Roofline
  compile_seconds: float
  versions: Mapping[str, str]

  @classmethod
  def of(
    cls,
    facts: Facts,
    topology: topologies.Topology,
    devices: Sequence[Any],
    program: program_lib.Program,
  ) -> "Plan":
    """Takes `mesh.devices.flat` of the mesh that the step was lowered for."""
    module = program.module
    found = collectives_lib.read(module, collectives_lib.Placement.of(topology, devices))
    moved = traffic.hbm_bytes(module)
    flops = matmuls.flops(module) + facts.kernel_flops / topology.devices
    return cls(
      facts=facts,
      topology=topology,
      memory=program.memory,
      overflow=program.overflow,
      largest=program.largest,
      collectives=tuple(found),
      program_flops=flops,
      hbm_bytes=moved,
      kernels=matmuls.kernels(module),
      unknown_loops=tuple(name for name, trips in module.trips.items() if trips is None),
      rematerialized=_rematerialized(module),
      donated=len(memory_lib.aliases(module)) >= facts.state_arrays,
      roofline=roofline_lib.roofline(
        topology.chip, flops + facts.padding_flops / topology.devices, moved, found
      ),
      compile_seconds=program.seconds,
      versions={name: _version(name) for name in ("jax", "jaxlib", "libtpu")},
    )

  @property
  def fits(self) -> bool:
    return self.overflow is None

  @property
  def model_flops(self) -> float:
    """The model's FLOPs of a step on one device, by the analytic count."""
    return self.facts.model_flops / self.topology.devices

  @property
  def speeds(self) -> tuple[roofline_lib.Speed, roofline_lib.Speed]:
    """If all overlaps and if nothing does."""
    return (self._speed(self.roofline.fastest), self._speed(self.roofline.slowest))

  def _speed(self, seconds: float) -> roofline_lib.Speed:
    facts = self.facts
    return roofline_lib.speed(self.topology, seconds, facts.tokens, facts.model_flops, facts.steps)

  def refusal(self) -> str:
    """One line: by how much the step does not fit, and what to change; "" if it fits."""
    if self.overflow is None:
      return ""
    return (
      f"{self.facts.name} does not fit {self.topology.chip.name}: a "
      f"{self.holder} needs {gib(self.overflow.needed)} of {gib(self.overflow.available)}, "
      f"{gib(self.overflow.excess)} too much; {'; or '.join(self.ways())}"
    )

  def ways(self) -> list[str]:
    """What may make it fit, the most promising first."""
    facts, found = self.facts, []
    usable = self.topology.chip.usable
    state = f"cut the state, {gib(facts.state_bytes)} of it, over more than {facts.fsdp} (fsdp)"
    can_cut = facts.fsdp < self.topology.devices
    if can_cut and facts.state_bytes > usable / 2:
      found.append(state)
    if not facts.recomputes_all:
      found.append("recompute every layer in the backward pass (remat full)")
    if facts.examples > 1:
      found.append(
        f"work a step off in more than {facts.accumulation} parts (accumulation): a "
        f"{self.holder} holds {facts.examples} examples at once"
      )
    if can_cut and state not in found:
      found.append(state)
    found.append(f"take a smaller batch, or more chips than {self.topology.chips:,}")
    return found

  @property
  def holder(self) -> str:
    """What has the memory that is told."""
    return "chip" if self.topology.chip.devices == 1 else "device (half a chip)"

  def to_json(self) -> str:
    """Returns all of it, derived figures included."""
    overlapped, serial = (dataclasses.asdict(speed) for speed in self.speeds)
    values = dataclasses.asdict(self)
    values["topology"] |= {
      "name": self.topology.name,
      "chips": self.topology.chips,
      "devices": self.topology.devices,
    }
    values["memory"]["peak"] = self.memory.peak
    values |= {
      "fits": self.fits,
      "refusal": self.refusal(),
      "model_flops": self.model_flops,
      "roofline": {**values["roofline"], "bound": self.roofline.bound},
      "all_overlaps": overlapped,
      "nothing_overlaps": serial,
    }
    return files.to_json(values)


def _rematerialized(module: runs.Module) -> int:
  moves = ("get-tuple-element", "bitcast", "copy")
  return sum(
    count for _, one, count in module.running() if ".remat" in one.name and one.opcode not in moves
  )


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "none"


def gib(size: float) -> str:
  """Returns a size in GiB, with its unit."""
  return f"{size / GIB:,.2f} GiB"
