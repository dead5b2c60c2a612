"""A compiled program -> what its devices send each other, by kind, bytes and network.

How the TPU compiler writes them (libtpu 0.0.52), beside the plain forms:

- A reduce-scatter is an all-reduce inside a fusion `all-reduce-scatter`, cut to
  the device's part. It moves what a reduce-scatter moves and is counted as one.
- An asynchronous collective stands in up to three fusions, its start, a matrix
  product beside it and its end: the start alone counts.
- A program is written for one slice (`num_partitions`). What crosses slices is a
  pair of `send` and `recv` to the host, marked `_xla_megascale_transfer_type`,
  between a collective within the slice before it and one after.
- On 7x a collective runs on another core, in a computation of an `async-start`.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from calm_jax.planning import hlo, runs, topologies

ICI, DCN = "ICI", "DCN"
# Links between the two devices of a 7x chip, in links of the interconnect: "six times faster
# than a 1D ICI link" (https://docs.cloud.google.com/tpu/docs/tpu7x).
_ON_CHIP_LINKS = 6


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where the devices that a program numbers are.

  Attributes:
    coordinates: of each device's chip in its slice, in the order of the mesh.
    slices: the slice of each.
  """

  topology: topologies.Topology
  coordinates: tuple[tuple[int, ...], ...]
  slices: tuple[int, ...]

  @classmethod
  def of(cls, topology: topologies.Topology, devices: Iterable[Any]) -> "Placement":
    """Takes `mesh.devices.flat`: a program numbers devices in the mesh's order."""
    devices = list(devices)
    return cls(
      topology,
      tuple(tuple(device.coords[: topology.chip.axes]) for device in devices),
      tuple(getattr(device, "slice_index", 0) for device in devices),
    )

  def numbered(self, partitions: int) -> "Placement":
    """Returns the placement of the devices that a program of so many numbers."""
    if partitions >= len(self.slices):
      return self
    first = [index for index, number in enumerate(self.slices) if number == self.slices[0]]
    return dataclasses.replace(
      self,
      coordinates=tuple(self.coordinates[index] for index in first),
      slices=tuple(self.slices[index] for index in first),
    )


@dataclasses.dataclass(frozen=True)
class Collective:
  """Collectives that are alike.

  Attributes:
    bytes: of the whole array in one group: gathered, or before it is reduced. For a
      permutation and an all-to-all, what one device gives away.
    group: devices that take part in each, one of every slice for DCN.
    count: how often a device takes part in one during a run.
    seconds: that one takes on the wire; see `_seconds`.
  """

  kind: str
  network: str
  group: int
  bytes: int
  count: int
  seconds: float

  @property
  def total_bytes(self) -> int:
    """Of all `count`."""
    return self.count * self.bytes

  @property
  def total_seconds(self) -> float:
    """Of all `count`, one after the other."""
    return self.count * self.seconds


def read(module: runs.Module, placement: Placement) -> list[Collective]:
  """Returns the collectives of one run, those that are alike together, the longest first."""
  local = placement.numbered(module.partitions)
  found: dict[Collective, int] = {}
  for computation, one, count in module.running():
    collective = _collective(computation, one, local, placement.topology)
    if collective:
      found[collective] = found.get(collective, 0) + count
  alike = [dataclasses.replace(collective, count=count) for collective, count in found.items()]
  return sorted(alike, key=lambda collective: -collective.total_seconds)


_KINDS = (
  "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
  "collective-permute", "collective-broadcast",
)  # fmt: skip


def _collective(
  computation: hlo.Computation,
  one: hlo.Instruction,
  placement: Placement,
  topology: topologies.Topology,
) -> Collective | None:
  if one.opcode == "send":
    return _between_slices(computation, one, topology)
  kind = one.opcode.removesuffix("-start")
  if kind not in _KINDS or not _begins(computation, one):
    return None
  groups = _groups(one, len(placement.slices))
  group = max(groups, key=lambda members: len({placement.slices[index] for index in members}))
  if len(group) == 1:
    return None
  given = sum(computation.instructions[name].bytes for name in one.operands)
  if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
    kind = "reduce-scatter"
  whole = given * len(group) if kind == "all-gather" else given
  network, seconds = _wire(kind, whole, group, placement)
  return Collective(kind, network, len(group), whole, 1, seconds)


def _begins(computation: hlo.Computation, one: hlo.Instruction) -> bool:
  """False for the same collective's later appearances."""
  if "async_collective_fusion_config" not in one.attributes:
    return True
  return any(user.target == "AsyncCollectiveStart" for user in computation.users[one.name])


def _between_slices(
  computation: hlo.Computation, one: hlo.Instruction, topology: topologies.Topology
) -> Collective | None:
  transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
  if not transfer:
    return None
  kind = transfer.group(1).lower().replace("_", "-")
  whole = computation.operand(one, 0).bytes * (topology.slices if kind == "all-gather" else 1)
  share = _shares(kind, topology.slices)
  seconds = share * whole / (topology.chip.dcn / topology.chip.devices)
  return Collective(kind, DCN, topology.slices, whole, 1, seconds)


def _groups(one: hlo.Instruction, devices: int) -> Sequence[Sequence[int]]:
  """Returns the devices of each group; of a permutation, its pairs."""
  written = one.attribute("source_target_pairs") or one.attribute("replica_groups")
  return replica_groups(written, devices)


def replica_groups(written: str, devices: int) -> Sequence[Sequence[int]]:
  """Returns the groups that XLA writes in any of its four ways; `{}` is one of all devices.

  `{{0,1},{2,3}}`; `[2,2]<=[4]`, with a transposition `[2,2]<=[2,2]T(1,0)`; over a
  mesh, `mesh['x'=2,'y'=2] {'y'}`, where an axis may be a part of one, `'x':(1)2`
  (what lies before it, its size), and the mesh may have its own `device_ids`.

  Source: xla/hlo/ir/replica_group.cc and mesh_and_axis.cc.
  """
  if written.startswith("mesh["):
    return _mesh_groups(written)
  if "<=" in written:
    shape, _, order = written.partition("<=")
    return _iota(order).reshape(_numbers(shape)).tolist()
  groups = [_numbers(group) for group in re.findall(r"\{([\d, ]+)\}", written)]
  return groups or [list(range(devices))]


def _iota(order: str) -> np.ndarray:
  sizes, _, transposition = order.partition("T")
  numbers = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
  return numbers.transpose(_numbers(transposition)) if transposition else numbers


def _mesh_groups(written: str) -> list[list[int]]:
  mesh, _, named = written.partition(" {")
  axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)]
  ids = re.search(r"device_ids=\(?(.*?)\)?$", mesh)
  numbers = np.arange(math.prod(size for _, size in axes))
  if ids:
    inside = ids.group(1)
    sizes = re.match(r"\[[\d,]+\]", inside)
    numbers = _iota(inside).reshape(-1) if sizes else np.array(_numbers(inside))
  # Each axis is cut into what lies before a named part of it, the part, and the rest.
  sizes, grouped = [], []
  wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named)
  for name, size in axes:
    parts = sorted((int(before or 1), int(part or size)) for n, before, part in wanted if n == name)
    done = 1
    for before, part in parts:
      sizes += [before // done, part]
      grouped.append(len(sizes) - 1)
      done = before * part
    sizes.append(size // done)
  rest = [axis for axis in range(len(sizes)) if axis not in grouped]
  width = math.prod(sizes[axis] for axis in grouped)
  return numbers.reshape(sizes).transpose(*rest, *grouped).reshape(-1, width).tolist()


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]


# What a device sends through a ring, of the whole array, in a group of n.
_SHARES: dict[str, Callable[[int], float]] = {
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-gather": lambda n: (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "ragged-all-to-all": lambda n: (n - 1) / n,
}


def _shares(kind: str, group: int) -> float:
  return _SHARES.get(kind, lambda n: 1.0)(group)


def _wire(kind: str, whole: int, group: Sequence[int], placement: Placement) -> tuple[str, float]:
  slices = {placement.slices[index] for index in group}
  if len(slices) > 1:
    # The slices exchange what the devices of one hold of it, each device a part.
    together = len(group) // len(slices)
    chip = placement.topology.chip
    seconds = _shares(kind, len(slices)) * whole / together / (chip.dcn / chip.devices)
    return DCN, seconds
  return ICI, _seconds(kind, whole, group, placement)


def _seconds(kind: str, whole: int, group: Sequence[int], placement: Placement) -> float:
  """Returns what a collective takes within a slice, without latencies.

  Rings along every axis of the torus that the group spans, at once, in both
  directions; an axis that does not close to a ring gives one direction. The
  devices of a chip share its links, unless they are in one group. An all-to-all
  crosses a quarter of the longest ring on average; a permutation one link.

  Source: How to Scale Your Model, section 3 (https://jax-ml.github.io/scaling-book/sharding).
  """
  topology = placement.topology
  chip = topology.chip
  places = [placement.coordinates[index] for index in group]
  chips = len(set(places))
  lengths = [len(set(axis)) for axis in zip(*places, strict=True)]
  if chips == 1:
    return _shares(kind, len(group)) * whole / (_ON_CHIP_LINKS * chip.link)
  shared = chip.devices * chips / len(group)  # Groups that use a chip's links at once.
  speeds = [
    chip.link * (2 if length == size and size % chip.wraps == 0 else 1) / shared
    for length, size in zip(lengths, topology.shape, strict=True)
    if length > 1
  ]
  if kind == "collective-permute":
    return whole / (chip.link / shared)
  if kind.endswith("all-to-all"):
    longest = max(length for length in lengths)
    return whole * max(1.0, longest / 4) / max(speeds)
  return _shares(kind, len(group)) * whole / sum(speeds)


def by_kind(collectives: Iterable[Collective]) -> dict[tuple[str, str, int], dict[str, float]]:
  """Returns count, bytes and seconds of each (kind, network, group), the longest first."""
  found: dict[tuple[str, str, int], dict[str, float]] = {}
  for one in collectives:
    sums = found.setdefault(
      (one.kind, one.network, one.group), {"count": 0, "bytes": 0, "seconds": 0.0}
    )
    sums["count"] += one.count
    sums["bytes"] += one.total_bytes
    sums["seconds"] += one.total_seconds
  return dict(itertools.chain(sorted(found.items(), key=lambda item: -item[1]["seconds"])))
