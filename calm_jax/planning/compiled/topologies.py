"""A name like "v5p:8x8x4" -> chips, their published figures and devices to compile for.

The TPU compiler is part of libtpu and needs no TPU: `devices` returns the devices of a slice
that is not attached, and a step compiled for them is the program that a real slice would
run. Observed with libtpu 0.0.52:

- `v4` has two devices per chip unless `chip_config_name="megacore"` is given, which Cloud TPU
  uses. `7x` is called `tpu7x` and always has two devices per chip.
- All other shapes need no argument, including single chips (`v5e:1x1`; unknown to libtpu
  0.0.42) and hosts (`v5e:2x4`). libtpu refuses shapes that hosts of 2x2 chips can't tile.
- Devices have `slice_index` if there are several slices.
- While one process has libtpu loaded, a second one fails at once with "libtpu
  multi-process lockfile".
"""

import dataclasses
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from calm_jax import errors

GIB = 2**30
_LOCK = pathlib.Path("/tmp/libtpu_lockfile")
# Keeps libtpu from asking the cloud's metadata server and the environment about this machine.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "",
}


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of one TPU generation, per chip unless stated otherwise.

  Attributes:
    name: our name of the generation.
    prefix: libtpu's name of the generation.
    devices: JAX devices per chip; they share the chip's figures.
    usable: bytes of memory per device that a program may use; the limit in libtpu 0.0.52's
      refusals.
    peak: bfloat16 FLOP/s.
    bandwidth: bytes/s of the memory.
    link: bytes/s of one interconnect link (ICI) in one direction.
    axes: dimensions of the torus; a chip has two links along each.
    wraps: an axis closes to a ring if its length is a multiple of this.
    largest: chips of the largest slice.
    dcn: bytes/s through the host's network (DCN) in one direction.
    examples: shapes for error messages.
    arguments: libtpu's arguments for this generation, other than the name.
  """

  name: str
  prefix: str
  devices: int
  usable: int
  peak: float
  bandwidth: float
  link: float
  axes: int
  wraps: int
  largest: int
  dcn: float
  examples: tuple[str, ...]
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "8x8x4", "8x8x8", "8x8x16")

# Sources: https://docs.cloud.google.com/tpu/docs/ with v4, v5e, v5p, v6e and tpu7x. They state ICI
# as bidirectional bytes/s per chip: 2 directions x 2 links per axis x axes x `link`. v4 has 6 links
# of 50 GB/s (arXiv:2304.01433, table 4); its DCN is not documented and is assumed to equal that of
# v5p, whose hosts are alike. v5e's DCN is its pod's 6.4 Tbit/s divided by 256 chips.
CHIPS: dict[str, Chip] = {
  chip.name: chip
  for chip in (
    Chip(
      name="v4",
      prefix="v4",
      devices=1,
      usable=int(30.75 * GIB),
      peak=275e12,
      bandwidth=1.2e12,
      link=50e9,
      axes=3,
      wraps=4,
      largest=4096,
      dcn=50e9 / 8,
      examples=_CUBES,
      arguments={"chip_config_name": "megacore"},
    ),
    Chip(
      name="v5e",
      prefix="v5e",
      devices=1,
      usable=int(15.75 * GIB),
      peak=197e12,
      bandwidth=819e9,
      link=50e9,
      axes=2,
      wraps=16,
      largest=256,
      dcn=25e9 / 8,
      examples=_FLAT,
    ),
    Chip(
      name="v5p",
      prefix="v5p",
      devices=1,
      usable=int(95.73 * GIB),
      peak=459e12,
      bandwidth=2765e9,
      link=100e9,
      axes=3,
      wraps=4,
      largest=8960,
      dcn=50e9 / 8,
      examples=_CUBES,
    ),
    Chip(
      name="v6e",
      prefix="v6e",
      devices=1,
      usable=int(31.24 * GIB),
      peak=918e12,
      bandwidth=1638e9,
      link=100e9,
      axes=2,
      wraps=16,
      largest=256,
      dcn=100e9 / 8,
      examples=_FLAT,
    ),
    Chip(
      name="7x",
      prefix="tpu7x",
      devices=2,
      usable=int(94.74 * GIB),
      peak=2307e12,
      bandwidth=7380e9,
      link=100e9,
      axes=3,
      wraps=4,
      largest=9216,
      dcn=100e9 / 8,
      examples=_CUBES,
    ),
  )
}


def known() -> str:
  """Returns the name of each chip's largest example, separated by commas."""
  return ", ".join(f"{chip.name}:{chip.examples[-1]}" for chip in CHIPS.values())


@dataclasses.dataclass(frozen=True)
class Topology:
  """One or more slices of the same shape.

  Attributes:
    shape: chips along each axis of a slice.
    slices: number of slices.
  """

  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

  @property
  def chips(self) -> int:
    """Chips of all slices."""
    return self.slices * math.prod(self.shape)

  @property
  def devices(self) -> int:
    """JAX devices of all slices."""
    return self.chips * self.chip.devices


def parse(name: str, slices: int = 1) -> Topology:
  """Returns the topology of a name like "v5p:8x8x4".

  Raises:
    CalmError: for an unknown chip, a shape that it does not have, or no slice.
  """
  if slices < 1:
    raise errors.CalmError(f"slices must be above 0, got {slices}")
  prefix, _, shape = name.partition(":")
  chip = CHIPS.get(prefix.removeprefix("tpu"))
  if chip is None:
    raise errors.CalmError(
      f"unknown chip {prefix!r} in topology {name!r}: known are {', '.join(CHIPS)}, each with a "
      f"shape, as in {known()}"
    )
  shapes = f"as in {', '.join(f'{chip.name}:{example}' for example in chip.examples)}"
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != chip.axes - 1:
    raise errors.CalmError(
      f"topology {name!r}: {chip.name} has shapes of {chip.axes} numbers, {shapes}"
    )
  sizes = tuple(int(size) for size in shape.split("x"))
  if math.prod(sizes) > chip.largest:
    raise errors.CalmError(
      f"topology {name!r} has {math.prod(sizes):,} chips, a slice of {chip.name} at most "
      f"{chip.largest:,}: give several slices, or a smaller shape, {shapes}"
    )
  return Topology(chip, sizes, slices)


def devices(topology: Topology) -> Sequence[Any]:
  """Returns `topology.devices` devices to compile for, slice by slice.

  They can't run programs or hold arrays. This process holds libtpu's lock until its end,
  unless ALLOW_MULTIPLE_LIBTPU_LOAD=1.

  Raises:
    CalmError: if libtpu is missing, is locked, or does not know the shape.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise errors.CalmError("compiling for a TPU needs its compiler: pip install libtpu")
  for variable, value in _ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  import jax
  from jax.experimental import topologies

  arguments = dict(topology.chip.arguments)
  if topology.slices > 1:
    arguments["num_slices"] = topology.slices
  shape = topology.name.partition(":")[2]
  try:
    topology_devices = topologies.get_topology_desc(
      platform="tpu", topology_name=f"{topology.chip.prefix}:{shape}", **arguments
    ).devices
  except jax.errors.JaxRuntimeError as error:
    raise _refusal(topology, str(error)) from error
  assert len(topology_devices) == topology.devices, (len(topology_devices), topology)
  return topology_devices


def _holder() -> str:
  """Returns which process holds libtpu's lock, if Linux reports it."""
  try:
    inode = _LOCK.stat().st_ino
    for line in pathlib.Path("/proc/locks").read_text().splitlines():
      *_, process, place, _, _ = line.split()
      if int(place.rpartition(":")[2]) == inode:
        command = pathlib.Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip()
        return f"process {process} ({command})"
  except (OSError, ValueError):
    pass
  return "which trains or compiles ahead"


def _refusal(topology: Topology, reason: str) -> errors.CalmError:
  """Returns the error for libtpu's refusal."""
  if "lockfile" in reason:
    return errors.CalmError(
      f"another process on this machine has loaded libtpu, {_holder()}: wait for it to end, or "
      "set ALLOW_MULTIPLE_LIBTPU_LOAD=1 where no TPU is attached"
    )
  examples = ", ".join(f"{topology.chip.name}:{example}" for example in topology.chip.examples)
  first = reason.strip().splitlines()[0]
  return errors.CalmError(
    f"libtpu knows no topology {topology.name!r} ({first}): shapes are as in {examples}"
  )
