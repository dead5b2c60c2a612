"""A compiled program -> its collectives: kind, network, devices, bytes and seconds.

How the TPU compiler writes them (libtpu 0.0.52), apart from the plain forms:

- A reduce-scatter is an all-reduce in a fusion `all-reduce-scatter` that keeps the device's
  part. It moves the bytes of a reduce-scatter and is counted as one.
- An asynchronous collective appears in up to three fusions: its start, a matrix product
  that overlaps with it, and its end. Only the start counts.
- A program is written for one slice (`num_partitions`). Transfers between slices are a
  `send` and a `recv` to the host, marked `_xla_megascale_transfer_type`, with a collective
  within the slice before and after them.
- On 7x a collective runs on another core, in the computation of an `async-start`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from calm_jax.planning.compiled import hlo, runs, topologies

ICI, DCN = "ICI", "DCN"
# Speed between the two devices of a 7x chip, in ICI links: "six times faster than a 1D ICI link"
# (https://docs.cloud.google.com/tpu/docs/tpu7x).
_ON_CHIP_LINKS = 6


@dataclasses.dataclass(frozen=True)
class Placement:
  """Coordinates of a program's devices, in the order of their numbers.

  Attributes:
    coordinates: coordinates of each device's chip in its slice.
    slices: slice of each device.
  """

  topology: topologies.Topology
  coordinates: tuple[tuple[int, ...], ...]
  slices: tuple[int, ...]

  @classmethod
  def of(cls, topology: topologies.Topology, devices: Iterable[Any]) -> "Placement":
    """Returns the placement of `mesh.devices.flat`: programs number devices in that order."""
    devices = list(devices)
    return cls(
      topology,
      tuple(tuple(device.coords[: topology.chip.axes]) for device in devices),
      tuple(getattr(device, "slice_index", 0) for device in devices),
    )

  def numbered(self, partitions: int) -> "Placement":
    """Returns the placement of the devices of a program for `partitions` devices."""
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
  """Collectives of the same kind and size.

  Attributes:
    kind: HLO's opcode, such as "all-gather".
    network: ICI or DCN.
    group: devices in one group; for DCN between slices, slices.
    bytes: bytes of a group's complete array, after gathering or before reducing. For a
      permutation and an all-to-all, the bytes that one device sends.
    count: collectives that one device takes part in, in one execution.
    seconds: time of one on the wire; see `_seconds`.
  """

  kind: str
  network: str
  group: int
  bytes: int
  count: int
  seconds: float

  @property
  def total_bytes(self) -> int:
    """Bytes of all `count`."""
    return self.count * self.bytes

  @property
  def total_seconds(self) -> float:
    """Seconds of all `count`, one after the other."""
    return self.count * self.seconds


def read(module: runs.Module, placement: Placement) -> list[Collective]:
  """Returns the collectives of one execution, equal ones merged, longest first."""
  local = placement.numbered(module.partitions)
  counts: dict[Collective, int] = {}
  for computation, instruction, count in module.running():
    collective = _collective(computation, instruction, local, placement.topology)
    if collective:
      counts[collective] = counts.get(collective, 0) + count
  merged = [dataclasses.replace(collective, count=count) for collective, count in counts.items()]
  return sorted(merged, key=lambda collective: -collective.total_seconds)


_KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)


def _collective(
  computation: hlo.Computation,
  instruction: hlo.Instruction,
  placement: Placement,
  topology: topologies.Topology,
) -> Collective | None:
  """Returns the collective that an instruction starts, with count 1; None if it starts none."""
  if instruction.opcode == "send":
    return _between_slices(computation, instruction, topology)
  kind = instruction.opcode.removesuffix("-start")
  if kind not in _KINDS or not _is_start(computation, instruction):
    return None
  groups = _groups(instruction, len(placement.slices))
  group = max(groups, key=lambda members: len({placement.slices[index] for index in members}))
  if len(group) == 1:
    return None
  operands = sum(computation.instructions[name].bytes for name in instruction.operands)
  if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
    kind = "reduce-scatter"
  size = operands * len(group) if kind == "all-gather" else operands
  network, seconds = _wire(kind, size, group, placement)
  return Collective(kind, network, len(group), size, 1, seconds)


def _is_start(computation: hlo.Computation, instruction: hlo.Instruction) -> bool:
  """Returns whether a collective starts here; False where it appears again."""
  if "async_collective_fusion_config" not in instruction.attributes:
    return True
  return any(user.target == "AsyncCollectiveStart" for user in computation.users[instruction.name])


def _between_slices(
  computation: hlo.Computation, send: hlo.Instruction, topology: topologies.Topology
) -> Collective | None:
  """Returns a transfer between slices, None if the send is another kind of transfer."""
  transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
  if not transfer:
    return None
  kind = transfer.group(1).lower().replace("_", "-")
  size = computation.operand(send, 0).bytes * (topology.slices if kind == "all-gather" else 1)
  sent = _sent(kind, topology.slices) * size
  seconds = sent / (topology.chip.dcn / topology.chip.devices)
  return Collective(kind, DCN, topology.slices, size, 1, seconds)


def _groups(instruction: hlo.Instruction, devices: int) -> Sequence[Sequence[int]]:
  """Returns the devices of each group; for a permutation, its pairs."""
  text = instruction.attribute("source_target_pairs") or instruction.attribute("replica_groups")
  return replica_groups(text, devices)


def replica_groups(text: str, devices: int) -> Sequence[Sequence[int]]:
  """Returns the devices of each group, from any of XLA's four notations.

  `{}` is one group of all devices. `{{0,1},{2,3}}` lists groups. `[2,2]<=[4]` reshapes
  0, 1, 2, ..., after a transposition in `[2,2]<=[2,2]T(1,0)`. `mesh['x'=2,'y'=2] {'y'}`
  names mesh axes; `'x':(1)2` is a part of an axis (size before it, its own size), and the
  mesh may have its own `device_ids`.

  Source: xla/hlo/ir/replica_group.cc and mesh_and_axis.cc.
  """
  if text.startswith("mesh["):
    return _mesh_groups(text)
  if "<=" in text:
    shape, _, order = text.partition("<=")
    return _iota(order).reshape(_numbers(shape)).tolist()
  groups = [_numbers(group) for group in re.findall(r"\{([\d, ]+)\}", text)]
  return groups or [list(range(devices))]


def _iota(order: str) -> np.ndarray:
  """Returns 0, 1, 2, ... in the shape of `[2,2]`, transposed for `[2,2]T(1,0)`."""
  sizes, _, transposition = order.partition("T")
  numbers = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
  return numbers.transpose(_numbers(transposition)) if transposition else numbers


def _mesh_groups(text: str) -> list[list[int]]:
  mesh, _, named = text.partition(" {")
  axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)]
  ids = re.search(r"device_ids=\(?(.*?)\)?$", mesh)
  numbers = np.arange(math.prod(size for _, size in axes))
  if ids:
    inside = ids.group(1)
    sizes = re.match(r"\[[\d,]+\]", inside)
    numbers = _iota(inside).reshape(-1) if sizes else np.array(_numbers(inside))
  # Each axis is split into the size before a named part, the part, and the rest.
  sizes, grouped = [], []
  named_parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named)
  for name, size in axes:
    parts = sorted(
      (int(before or 1), int(part or size)) for n, before, part in named_parts if n == name
    )
    split_size = 1
    for before, part in parts:
      sizes += [before // split_size, part]
      grouped.append(len(sizes) - 1)
      split_size = before * part
    sizes.append(size // split_size)
  rest = [axis for axis in range(len(sizes)) if axis not in grouped]
  width = math.prod(sizes[axis] for axis in grouped)
  return numbers.reshape(sizes).transpose(*rest, *grouped).reshape(-1, width).tolist()


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]


# Share of the array that a device sends through a ring, in a group of n.
_SENT: dict[str, Callable[[int], float]] = {
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-gather": lambda n: (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "ragged-all-to-all": lambda n: (n - 1) / n,
}


def _sent(kind: str, group: int) -> float:
  return _SENT.get(kind, lambda n: 1.0)(group)


def _wire(kind: str, size: int, group: Sequence[int], placement: Placement) -> tuple[str, float]:
  """Returns the network and the seconds of a collective."""
  slices = {placement.slices[index] for index in group}
  if len(slices) > 1:
    # Slices exchange the array, and each device of a slice an equal part of it.
    parts = len(group) // len(slices)
    chip = placement.topology.chip
    return DCN, _sent(kind, len(slices)) * size / parts / (chip.dcn / chip.devices)
  return ICI, _seconds(kind, size, group, placement)


def _seconds(kind: str, size: int, group: Sequence[int], placement: Placement) -> float:
  """Returns the seconds of a collective within a slice, without latencies.

  Rings run along all torus axes that the group spans, at once and in both directions; an
  axis that does not close to a ring has one direction. The devices of a chip share its
  links, unless they are in the same group. An all-to-all crosses a quarter of the longest
  ring on average, a permutation one link.

  Source: How to Scale Your Model, section 3 (https://jax-ml.github.io/scaling-book/sharding).
  """
  topology = placement.topology
  chip = topology.chip
  places = [placement.coordinates[index] for index in group]
  chips = len(set(places))
  lengths = [len(set(axis)) for axis in zip(*places, strict=True)]
  if chips == 1:
    return _sent(kind, len(group)) * size / (_ON_CHIP_LINKS * chip.link)
  sharing = chip.devices * chips / len(group)  # Groups that use a chip's links at once.
  speeds = [
    chip.link * (2 if length == extent and extent % chip.wraps == 0 else 1) / sharing
    for length, extent in zip(lengths, topology.shape, strict=True)
    if length > 1
  ]
  if kind == "collective-permute":
    return size / (chip.link / sharing)
  if kind.endswith("all-to-all"):
    longest = max(length for length in lengths)
    return size * max(1.0, longest / 4) / max(speeds)
  return _sent(kind, len(group)) * size / sum(speeds)


def by_kind(collectives: Iterable[Collective]) -> dict[tuple[str, str, int], dict[str, float]]:
  """Returns count, bytes and seconds by (kind, network, group), longest first."""
  groups: dict[tuple[str, str, int], dict[str, float]] = {}
  for collective in collectives:
    key = (collective.kind, collective.network, collective.group)
    sums = groups.setdefault(key, {"count": 0, "bytes": 0, "seconds": 0.0})
    sums["count"] += collective.count
    sums["bytes"] += collective.total_bytes
    sums["seconds"] += collective.total_seconds
  return dict(sorted(groups.items(), key=lambda item: -item[1]["seconds"]))
