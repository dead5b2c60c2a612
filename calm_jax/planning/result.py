"""A compiled program -> the plan: its memory, collectives and time, and all of it as JSON."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from calm_jax import files
from calm_jax.planning.compiled import collectives as collectives_lib
from calm_jax.planning.compiled import matmuls, runs, topologies, traffic
from calm_jax.planning.compiled import memory as memory_lib
from calm_jax.planning.compiled import program as program_lib
from calm_jax.planning.compiled import roofline as roofline_lib

GIB = memory_lib.GIB


@dataclasses.dataclass(frozen=True)
class Facts:
  """Facts about a step that its program does not state.

  Attributes:
    name: the config's name.
    parameters: trained parameters, on all chips.
    state_bytes: bytes of the train state on one device.
    state_arrays: arrays of the train state.
    tokens: tokens of a step, on all chips.
    model_flops: analytic FLOPs of a step, on all chips.
    steps: steps of the run.
    kernel_flops: FLOPs of a step in Pallas kernels (attention), on all chips.
    padding_flops: FLOPs of those kernels in padded blocks and lanes, on all chips.
    fsdp: devices that the state is sharded over.
    examples: examples of a device in one part of a step.
    accumulation: parts of a step.
    recomputes_all: whether the backward pass keeps nothing of a layer but its input.
    choices: settings of the layout, to be printed.
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
  """A step on a topology. Bytes and FLOPs are those of one device; 7x has two per chip.

  Attributes:
    program_flops: FLOPs of the program's matrix products, recomputation included, and
      `facts.kernel_flops`. `facts.padding_flops` are left out, but cost time too.
    hbm_bytes: bytes read from and written to main memory.
    kernels: custom calls, whose FLOPs the program does not state, and runs of each.
    unknown_loops: loops of unknown trip count, which are counted once.
    rematerialized: values that XLA itself recomputes where memory is short. A program near
      its limit has more FLOPs than the model and its recomputation.
    donated: whether every array of the new state overwrites the old one.
    compile_seconds: compile time.
    versions: versions of the compiler's packages.
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
    program: program_lib.CompiledProgram,
  ) -> "Plan":
    """Returns the plan of a compiled step.

    Args:
      devices: `mesh.devices.flat` of the mesh that the step was lowered on.
    """
    module = program.module
    placement = collectives_lib.Placement.of(topology, devices)
    collectives = tuple(collectives_lib.read(module, placement))
    hbm_bytes = traffic.hbm_bytes(module)
    flops = matmuls.flops(module) + facts.kernel_flops / topology.devices
    return cls(
      facts=facts,
      topology=topology,
      memory=program.memory,
      overflow=program.overflow,
      largest=program.largest,
      collectives=collectives,
      program_flops=flops,
      hbm_bytes=hbm_bytes,
      kernels=matmuls.kernels(module),
      unknown_loops=tuple(name for name, trips in module.trips.items() if trips is None),
      rematerialized=_rematerialized(module),
      donated=len(memory_lib.aliases(module)) >= facts.state_arrays,
      roofline=roofline_lib.roofline(
        topology.chip, flops + facts.padding_flops / topology.devices, hbm_bytes, collectives
      ),
      compile_seconds=program.seconds,
      versions={name: _version(name) for name in ("jax", "jaxlib", "libtpu")},
    )

  @property
  def fits(self) -> bool:
    return self.overflow is None

  @property
  def model_flops(self) -> float:
    """Analytic FLOPs of a step on one device."""
    return self.facts.model_flops / self.topology.devices

  @property
  def speeds(self) -> tuple[roofline_lib.Speed, roofline_lib.Speed]:
    """Speeds if everything overlaps, and if nothing does."""
    return (self._speed(self.roofline.fastest), self._speed(self.roofline.slowest))

  def _speed(self, seconds: float) -> roofline_lib.Speed:
    facts = self.facts
    return roofline_lib.speed(self.topology, seconds, facts.tokens, facts.model_flops, facts.steps)

  def refusal(self) -> str:
    """Returns a line on how much memory is missing and what to change; "" if the step fits."""
    if self.overflow is None:
      return ""
    return (
      f"{self.facts.name} does not fit {self.topology.chip.name}: a "
      f"{self.device} needs {gib(self.overflow.needed)} of {gib(self.overflow.available)}, "
      f"{gib(self.overflow.excess)} too much; {'; or '.join(self.remedies())}"
    )

  def remedies(self) -> list[str]:
    """Returns changes that may make the step fit, the most promising first."""
    facts, remedies = self.facts, []
    usable = self.topology.chip.usable
    shard = f"shard the state, {gib(facts.state_bytes)}, over more than {facts.fsdp} devices (fsdp)"
    can_shard = facts.fsdp < self.topology.devices
    if can_shard and facts.state_bytes > usable / 2:
      remedies.append(shard)
    if not facts.recomputes_all:
      remedies.append("recompute every layer in the backward pass (remat full)")
    if facts.examples > 1:
      remedies.append(
        f"divide a step into more than {facts.accumulation} parts (accumulation): a "
        f"{self.device} holds {facts.examples} examples at once"
      )
    if can_shard and shard not in remedies:
      remedies.append(shard)
    remedies.append(f"use a smaller batch, or more chips than {self.topology.chips:,}")
    return remedies

  @property
  def device(self) -> str:
    """Name of one device of this chip in messages."""
    return "chip" if self.topology.chip.devices == 1 else "device (half a chip)"

  def to_json(self) -> str:
    """Returns the plan and the figures derived from it."""
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
  """Returns the number of values that XLA recomputes, by its names for them."""
  moves = ("get-tuple-element", "bitcast", "copy")
  return sum(
    count
    for _, instruction, count in module.running()
    if ".remat" in instruction.name and instruction.opcode not in moves
  )


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "none"


def gib(size: float) -> str:
  """Returns a size in bytes as text in GiB."""
  return f"{size / GIB:,.2f} GiB"
