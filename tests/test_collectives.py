"""Claims about the collectives of a compiled program."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from calm_jax.planning.compiled import collectives, runs, topologies

RING = topologies.parse("v5e:16x16")
FLAT = topologies.parse("v5e:4x4")
LINK = 50e9


def placement(topology: topologies.Topology) -> collectives.Placement:
  """Returns all devices, slice by slice, row-major over chips, the devices of a chip together."""
  places = [
    place for place in np.ndindex(*topology.shape) for _ in range(topology.chip.devices)
  ] * topology.slices
  slices = np.repeat(np.arange(topology.slices), len(places) // topology.slices)
  return collectives.Placement(topology, tuple(places), tuple(int(number) for number in slices))


def program(lines: str, partitions: int) -> runs.Module:
  head = f"HloModule one, num_partitions={partitions}, x=y\n\nENTRY %main () -> f32[] {{\n"
  return runs.read(f"{head}  %p = f32[1024,256]{{1,0}} parameter(0)\n{lines}\n}}")


def read(line: str, topology: topologies.Topology, partitions: int | None = None):
  module = program(f"  ROOT {line}", partitions or topology.devices)
  return collectives.read(module, placement(topology))


@pytest.mark.parametrize(
  "text, groups",
  [
    ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
    ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("{}", [[0, 1, 2, 3]]),
    ("[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("[1,4]<=[4]", [[0, 1, 2, 3]]),
    ("mesh['a'=4] {'a'}", [[0, 1, 2, 3]]),
    ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", [[3, 2], [1, 0]]),
  ],
)
def test_groups_are_parsed_in_every_notation(text: str, groups: list[list[int]]):
  assert [list(group) for group in collectives.replica_groups(text, 4)] == groups


# A MiB of float32 on each device. A full row of the torus is a closed ring of 16, with 50 GB/s in
# each of its two directions.
SIZE = 1024 * 256 * 4


@pytest.mark.parametrize(
  "line, kind, size, seconds",
  [
    ("all-reduce(%p)", "all-reduce", SIZE, 2 * 15 / 16 * SIZE / (2 * LINK)),
    ("all-gather(%p), dimensions={0}", "all-gather", 16 * SIZE, 15 * SIZE / (2 * LINK)),
    ("reduce-scatter(%p), dimensions={0}", "reduce-scatter", SIZE, 15 / 16 * SIZE / (2 * LINK)),
    ("all-to-all(%p)", "all-to-all", SIZE, 16 / 4 * SIZE / (2 * LINK)),
    (
      "collective-permute(%p), source_target_pairs={{0,1},{1,0}}",
      "collective-permute",
      SIZE,
      SIZE / LINK,
    ),
  ],
)
def test_rings_by_hand(line: str, kind: str, size: int, seconds: float):
  groups = ", replica_groups=[16,16]<=[256]" if "permute" not in line else ""
  (collective,) = read(f"%c = f32[1024,256]{{1,0}} {line}{groups}", RING)
  assert (collective.kind, collective.network, collective.bytes, collective.count) == (
    kind,
    collectives.ICI,
    size,
    1,
  )
  assert collective.group == (2 if "permute" in line else 16)
  assert collective.seconds == pytest.approx(seconds)


def test_two_axes_are_twice_as_fast_and_an_open_axis_is_half_as_fast():
  line = "%c = f32[1024,256]{1,0} all-reduce(%p), replica_groups="
  (row,) = read(line + "[16,16]<=[256]", RING)
  (both,) = read(line + "[1,256]<=[256]", RING)
  (open_row,) = read(line + "[4,4]<=[16]", FLAT)
  assert row.seconds == pytest.approx(2 * 15 / 16 * SIZE / (2 * LINK))
  assert both.seconds == pytest.approx(2 * 255 / 256 * SIZE / (4 * LINK))
  assert open_row.seconds == pytest.approx(2 * 3 / 4 * SIZE / LINK)


def test_devices_of_a_chip_share_its_links():
  topology = topologies.parse("7x:4x4x4")  # Closed axes of 4, two devices a chip.
  line = "%c = f32[1024,256]{1,0} all-reduce(%p), replica_groups="
  (alone,) = read(line + "[32,4]<=[16,4,2]T(0,2,1)", topology)  # One device of each of 4 chips.
  (together,) = read(line + "[16,8]<=[128]", topology)
  (within,) = read(line + "[64,2]<=[128]", topology)
  assert alone.seconds == pytest.approx(2 * 3 / 4 * SIZE / (2 * 100e9 / 2))
  assert together.seconds == pytest.approx(2 * 7 / 8 * SIZE / (2 * 100e9))
  assert within.seconds == pytest.approx(2 * 1 / 2 * SIZE / (6 * 100e9))


def test_groups_that_cross_slices_go_through_the_network():
  topology = dataclasses.replace(FLAT, slices=2)
  line = "%c = f32[1024,256]{1,0} all-reduce(%p), replica_groups=[1,32]<=[32]"
  (collective,) = read(line, topology)
  # Each of the 16 devices of a slice exchanges a sixteenth.
  assert collective.network == collectives.DCN and collective.group == 32
  assert collective.seconds == pytest.approx(2 * 1 / 2 * SIZE / 16 / (25e9 / 8))


def test_a_program_for_one_slice_numbers_the_devices_of_that_slice():
  topology = dataclasses.replace(FLAT, slices=2)
  places = placement(topology)
  turns = [index for pair in zip(range(16), range(16, 32), strict=True) for index in pair]
  mixed = dataclasses.replace(
    places,
    coordinates=tuple(places.coordinates[index] for index in turns),
    slices=tuple(places.slices[index] for index in turns),
  )
  line = "ROOT %c = f32[1024,256]{1,0} all-reduce(%p), replica_groups=[4,4]<=[16]"
  (collective,) = collectives.read(program(f"  {line}", partitions=16), mixed)
  # Devices 0 to 3 of a slice are a row of four, an open axis.
  assert collective.network == "ICI" and collective.seconds == pytest.approx(
    2 * 3 / 4 * SIZE / LINK
  )


def test_transfers_between_slices_are_found():
  topology = dataclasses.replace(FLAT, slices=2)
  line = (
    "%send = (f32[1024,256]{1,0}, u32[], token[]) send(%p, %p), channel_id=2, "
    'is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
  )
  (collective,) = read(line, topology, partitions=16)
  assert (collective.kind, collective.network, collective.group, collective.bytes) == (
    "all-reduce",
    "DCN",
    2,
    SIZE,
  )
  assert collective.seconds == pytest.approx(2 * 1 / 2 * SIZE / (25e9 / 8))
  assert not read(line.replace("ALL_REDUCE", "").replace("transfer_type", "other"), topology)


ASYNC = """HloModule one, num_partitions=16, x=y

%start (p.1: f32[1024,256]) -> (f32[1024,256], f32[16384,256]) {
  %p.1 = f32[1024,256]{1,0} parameter(0)
  %all-gather.1 = f32[16384,256]{1,0} all-gather(%p.1), channel_id=6, replica_groups={}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %custom-call.1 = (f32[1024,256]{1,0}, f32[16384,256]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p.2: f32[1024,256]) -> f32[16384,256] {
  %p.2 = f32[1024,256]{1,0} parameter(0)
  ROOT %all-gather.2 = f32[16384,256]{1,0} all-gather(%p.2), channel_id=6, replica_groups={}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%all-reduce-scatter.3 (p.3: f32[1024,256]) -> f32[64,256] {
  %p.3 = f32[1024,256]{1,0} parameter(0)
  %all-reduce.3 = f32[1024,256]{1,0} all-reduce(%p.3), replica_groups={}, to_apply=%add
  %constant.3 = s32[] constant(0)
  ROOT %dynamic-slice.3 = f32[64,256]{1,0} dynamic-slice(%all-reduce.3, %constant.3, %constant.3), dynamic_slice_sizes={64,256}
}

ENTRY %main (p: f32[1024,256]) -> f32[64,256] {
  %p = f32[1024,256]{1,0} parameter(0)
  %fusion.1 = (f32[1024,256]{1,0}, f32[16384,256]{1,0}) fusion(%p), kind=kCustom, calls=%start
  %fusion.2 = f32[16384,256]{1,0} fusion(%p), kind=kCustom, calls=%beside
  %all-reduce-start = f32[1024,256]{1,0} all-reduce-start(%p), replica_groups={}, to_apply=%add
  %all-reduce-done = f32[1024,256]{1,0} all-reduce-done(%all-reduce-start)
  ROOT %fusion.3 = f32[64,256]{1,0} fusion(%all-reduce-done), kind=kCustom, calls=%all-reduce-scatter.3
}
"""  # noqa: E501


def test_the_parts_of_an_asynchronous_collective_count_once():
  merged = collectives.read(runs.read(ASYNC), placement(FLAT))
  assert {(row.kind, row.count, row.bytes) for row in merged} == {
    ("all-gather", 1, 16 * SIZE),
    ("all-reduce", 1, SIZE),
    ("reduce-scatter", 1, SIZE),
  }


def test_a_scanned_step_on_eight_devices_gathers_every_layer():
  mesh = Mesh(np.array(jax.devices()), ("fsdp",), axis_types=(AxisType.Auto,))
  cut, batch = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P("fsdp"))

  def loss(ws, x):
    def layer(x, w):
      w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
      return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), batch), None

    return jnp.mean(jax.lax.scan(layer, x, ws)[0])

  ws = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=cut)
  x = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=batch)
  compiled = jax.jit(loss).lower(ws, x).compile()
  topology = topologies.parse("v5e:2x4")
  sums = collectives.by_kind(collectives.read(runs.read(compiled.as_text()), placement(topology)))
  assert sums[("all-gather", "ICI", 8)]["count"] == 5
  assert sums[("all-gather", "ICI", 8)]["bytes"] == 5 * 64 * 64 * 4
  assert sums[("all-reduce", "ICI", 8)]["bytes"] == 4
