"""A name like "v5p:8x8x4" -> chips, their published figures and devices to compile for.

The TPU compiler ships with libtpu and needs no TPU: `devices` hands out the
devices of a slice that is not there, and a step compiled for them is the program
that a slice would run. Found with libtpu 0.0.52:

- `v4` shows two devices a chip unless `chip_config_name="megacore"` is asked for,
  as Cloud TPU runs it; `7x` is called `tpu7x` and always shows two a chip.
- Every other shape needs no argument, single chips (`v5e:1x1`) and hosts (`v5e:2x4`)
  included; libtpu 0.0.42 knows no single chip. A shape that hosts of 2x2 chips can't tile
  is refused by libtpu.
- With several slices a device has `slice_index`; with one it does not.
- A second process that loads libtpu fails at once with "libtpu multi-process
  lockfile" while the first one lives.
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
# libtpu asks the cloud's metadata server and the environment who it is: it is nobody.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "",
}


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of one generation, each a chip unless it says otherwise.

  Attributes:
    prefix: libtpu's name of the generation.
    devices: devices a chip, as JAX shows them; they share all that follows.
    hbm: bytes of memory, as published.
    usable: bytes of it that the compiler gives to a program, a device; what libtpu
      0.0.52 names where a program does not fit.
    peak: bfloat16 FLOP/s.
    bandwidth: bytes/s of the memory.
    link: bytes/s of one interconnect link (ICI) in one direction.
    axes: dimensions of the torus; a chip has two links along each.
    wraps: an axis closes to a ring where its length is a multiple of this.
    largest: chips of the largest slice.
    dcn: bytes/s a chip through its host's network (DCN), in one direction.
    examples: shapes, to be told where one is wrong.
    source: of these figures.
    arguments: what libtpu has to be asked besides the name.
  """

  name: str
  prefix: str
  devices: int
  hbm: int
  usable: int
  peak: float
  bandwidth: float
  link: float
  axes: int
  wraps: int
  largest: int
  dcn: float
  examples: tuple[str, ...]
  source: str
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "8x8x4", "8x8x8", "8x8x16")
_DOCS = "https://docs.cloud.google.com/tpu/docs/"

# The documents state ICI as bidirectional bytes/s a chip: 2 directions x 2 links an axis
# x axes x `link`. v4's is 6 links of 50 GB/s (arXiv:2304.01433, table 4); its DCN is not in
# its document and taken as v5p's, whose hosts are alike. v5e's DCN is its pod's 6.4 Tbit/s
# over 256 chips.
CHIPS: dict[str, Chip] = {
  chip.name: chip
  for chip in (
    Chip(
      "v4", "v4", 1, 32 * GIB, int(30.75 * GIB), 275e12, 1.2e12, 50e9, 3, 4, 4096, 50e9 / 8,
      _CUBES, _DOCS + "v4", {"chip_config_name": "megacore"},
    ),
    Chip(
      "v5e", "v5e", 1, 16 * GIB, int(15.75 * GIB), 197e12, 819e9, 50e9, 2, 16, 256, 25e9 / 8,
      _FLAT, _DOCS + "v5e",
    ),
    Chip(
      "v5p", "v5p", 1, 95 * GIB, int(95.73 * GIB), 459e12, 2765e9, 100e9, 3, 4, 8960, 50e9 / 8,
      _CUBES, _DOCS + "v5p",
    ),
    Chip(
      "v6e", "v6e", 1, 32 * GIB, int(31.24 * GIB), 918e12, 1638e9, 100e9, 2, 16, 256, 100e9 / 8,
      _FLAT, _DOCS + "v6e and " + _DOCS + "tpu7x",
    ),
    Chip(
      "7x", "tpu7x", 2, 192 * GIB, int(94.74 * GIB), 2307e12, 7380e9, 100e9, 3, 4, 9216,
      100e9 / 8, _CUBES, _DOCS + "tpu7x",
    ),
  )
}  # fmt: skip


def known() -> str:
  """Returns the largest example of each chip, for people."""
  return ", ".join(f"{chip.name}:{chip.examples[-1]}" for chip in CHIPS.values())


@dataclasses.dataclass(frozen=True)
class Topology:
  """Slices of one shape.

  Attributes:
    shape: chips along each axis of a slice.
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
    """Devices of all slices, as JAX shows them."""
    return self.chips * self.chip.devices


def parse(name: str, slices: int = 1) -> Topology:
  """Returns the topology of a name like "v5p:8x8x4".

  Raises:
    CalmError: for an unknown chip, a shape that it has not, or no slice.
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
  """Returns devices to compile for: slice by slice, `topology.devices` of them.

  They can't run anything or hold an array. Takes libtpu's lock for as long as
  this process lives, unless ALLOW_MULTIPLE_LIBTPU_LOAD=1.

  Raises:
    CalmError: where libtpu is missing or locked, or knows no such shape.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise errors.CalmError("compiling for a TPU takes its compiler: pip install libtpu")
  for variable, value in _ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  import jax
  from jax.experimental import topologies

  arguments = dict(topology.chip.arguments)
  if topology.slices > 1:
    arguments["num_slices"] = topology.slices
  shape = topology.name.partition(":")[2]
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=f"{topology.chip.prefix}:{shape}", **arguments
    ).devices
  except jax.errors.JaxRuntimeError as error:
    raise _told(topology, str(error)) from error
  assert len(found) == topology.devices, (len(found), topology)
  return found


def _holder() -> str:
  """Returns who holds libtpu's lock, as far as Linux tells."""
  try:
    inode = _LOCK.stat().st_ino
    for line in pathlib.Path("/proc/locks").read_text().splitlines():
      *_, process, place, _, _ = line.split()
      if int(place.rpartition(":")[2]) == inode:
        command = pathlib.Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip()
        return f"process {process} ({command})"
  except (OSError, ValueError):
    pass
  return "training, or compiling as this does"


def _told(topology: Topology, reason: str) -> errors.CalmError:
  """Returns what libtpu's refusal means."""
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
