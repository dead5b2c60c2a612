"""Claims about plans: memory, traffic, roofline, and steps compiled for a TPU that is not there."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from calm_jax.planning import (
  collectives,
  matmuls,
  memory,
  program,
  result,
  roofline,
  runs,
  tables,
  topologies,
  traffic,
)

GIB = 2**30
LAYERS, BATCH, WIDTH, FFN = 4, 64, 256, 512


# Memory.

REFUSAL = (
  "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
  "required for HLO temporaries (18.37G) exceeds available HBM (15.75G). HLO module: jit_step."
)


def test_a_refusal_is_read():
  found = memory.overflow(REFUSAL)
  assert found
  assert found.needed == int(18.37 * GIB) and found.available == int(15.75 * GIB)
  assert found.excess == found.needed - found.available
  assert memory.overflow("INTERNAL: something else (12.5G)") is None


def test_the_peak_counts_what_is_donated_once():
  state, batch, metrics, temporaries = 1000, 10, 1, 500
  donated = memory.Memory(state + batch, state + metrics, state, temporaries, code=7)
  kept = dataclasses.replace(donated, aliased=0)
  assert donated.peak == state + batch + metrics + temporaries
  assert kept.peak == donated.peak + state


def test_donation_and_arguments_are_read_from_the_text():
  def step(state, x):
    return jax.tree.map(lambda s: s + x.sum(), state), x.mean()

  state = {"a": jnp.zeros((8, 16)), "b": jnp.zeros(32)}
  lowered = jax.jit(step, donate_argnums=0).lower(state, jnp.ones(64))
  compiled = lowered.compile()
  module = runs.read(compiled.as_text())
  assert sorted(memory.aliases(module)) == [((0,), 0), ((1,), 1)]
  holds = memory.memory_of(compiled)
  assert holds.aliased == (8 * 16 + 32) * 4
  needed = holds.arguments + holds.values - holds.aliased + 1000
  read = memory.memory_of_refused(module, memory.Overflow(needed, 10))
  assert (read.arguments, read.values, read.aliased) == (
    (8 * 16 + 32 + 64) * 4,
    (8 * 16 + 32 + 1) * 4,
    (8 * 16 + 32) * 4,
  )
  assert read.peak == needed
  kept = runs.read(jax.jit(step).lower(state, jnp.ones(64)).compile().as_text())
  assert memory.aliases(kept) == []


def test_the_largest_buffers_are_read():
  report = """Total bytes: 53299141632 (49.64GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
   33.06GiB( 67%);   33.06GiB;  17750294528;                2; s32[94208,94208]
   49.59GiB(100%);       512B;            0;                2; bf16[94208,94208], pred[]
  """
  assert memory.largest(report) == [
    memory.Buffer(int(33.06 * GIB), "s32[94208,94208]"),
    memory.Buffer(512, "bf16[94208,94208], pred[]"),
  ]


def test_the_compilers_own_report_is_believed_about_temporaries():
  compiled = jax.jit(lambda x: 2 * x).lower(jnp.ones(64)).compile()
  lines = ["Memory Space: default (color=0)", "Total bytes: 1512 (1.5KiB)", ""]
  vmem = ["Memory Space: vmem (color=1)", "Total bytes: 9999 (9.8KiB)"]
  holds = memory.memory_of(compiled, "\n".join(lines + vmem))
  assert (holds.peak, holds.temporaries) == (1512, 1000)  # 64 numbers in, 64 out.


# Traffic.

MOVES = """HloModule one

%slicing (p.0: f32[4,256], p.1: s32[]) -> f32[1,256] {
  %p.0 = f32[4,256]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %dynamic-slice.1 = f32[1,256]{1,0} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={1,256}
}

%updating (p.2: f32[4,256], p.3: f32[1,256], p.4: s32[]) -> f32[4,256] {
  %p.2 = f32[4,256]{1,0} parameter(0)
  %p.3 = f32[1,256]{1,0} parameter(1)
  %p.4 = s32[] parameter(2)
  ROOT %dynamic-update-slice.1 = f32[4,256]{1,0} dynamic-update-slice(%p.2, %p.3, %p.4, %p.4)
}

ENTRY %main (a: f32[4,256], b: s32[]) -> f32[4,256] {
  %a = f32[4,256]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %fusion.1 = f32[1,256]{1,0} fusion(%a, %b), kind=kLoop, calls=%slicing
  %tanh.1 = f32[1,256]{1,0:S(1)} tanh(%fusion.1)
  %tanh.2 = f32[1,256]{1,0:S(1)} tanh(%tanh.1)
  ROOT %fusion.2 = f32[4,256]{1,0} fusion(%a, %tanh.2, %b), kind=kLoop, calls=%updating
}
"""  # noqa: E501


def test_slices_move_their_own_bytes_and_the_chips_own_memory_is_free():
  row, number = 256 * 4, 4
  slicing = row + number + row  # The row and its number read, the row written.
  tanh = row  # Read; what is kept in the chip is neither written nor read.
  updating = number + row  # The number read, the row written: in place, from the chip.
  assert traffic.hbm_bytes(runs.read(MOVES)) == slicing + tanh + updating


# Roofline.


def test_times_are_work_over_published_peaks():
  chip = topologies.CHIPS["v5e"]
  wires = [
    collectives.Collective("all-reduce", collectives.ICI, 4, 8, count=3, seconds=2.0),
    collectives.Collective("all-reduce", collectives.DCN, 2, 8, count=2, seconds=0.5),
  ]
  times = roofline.roofline(chip, 2 * 197e12, 3 * 819e9, wires)
  assert (times.compute, times.memory) == pytest.approx((2.0, 3.0))
  assert (times.interconnect, times.network) == (6.0, 1.0)
  assert times.bound == "interconnect"
  assert (times.fastest, times.slowest) == (6.0, pytest.approx(12.0))


def test_a_device_has_its_part_of_a_chip():
  times = roofline.roofline(topologies.CHIPS["7x"], 2307e12 / 2, 7380e9 / 2, [])
  assert (times.compute, times.memory) == pytest.approx((1.0, 1.0))


def test_speed_is_of_the_model_not_of_the_program():
  topology = topologies.parse("v5e:4x4")
  found = roofline.speed(topology, 2.0, tokens=1000, model_flops=16 * 197e12, steps=43_200)
  assert found.tokens_per_second == 500 and found.mfu == pytest.approx(0.5)
  assert found.days == 1.0


# Steps compiled for a TPU.


@pytest.fixture
def tpu(monkeypatch: pytest.MonkeyPatch):
  """Devices of a slice of four, two by two."""
  pytest.importorskip("libtpu", reason="compiling for a TPU takes its compiler")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  topology = topologies.parse("v5e:2x2")
  return topology, topologies.devices(topology)


def lowered(devices, scanned: bool, batch: int = BATCH, donate: bool = True):
  """A step of gradient descent on a chain of products, its state cut over the devices."""
  mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
  cut, rows = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P("fsdp"))
  whole = NamedSharding(mesh, P())

  def loss(ws, x):
    def layer(x, w):
      w = jax.tree.map(lambda w: jax.lax.with_sharding_constraint(w, whole), w)
      return jax.lax.with_sharding_constraint(jnp.tanh(x @ w[0]) @ w[1], rows), None

    if scanned:
      x, _ = jax.lax.scan(layer, x, ws)
    else:
      for index in range(LAYERS):
        x, _ = layer(x, jax.tree.map(lambda w, index=index: w[index], ws))
    return jnp.mean(x.astype(jnp.float32) ** 2)

  def step(ws, x):
    value, (grads, slope) = jax.value_and_grad(loss, (0, 1))(ws, x)
    return jax.tree.map(lambda w, g: w - g, ws, grads), value + jnp.max(slope)

  shapes = ((LAYERS, WIDTH, FFN), (LAYERS, FFN, WIDTH))
  ws = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=cut) for shape in shapes)
  x = jax.ShapeDtypeStruct((batch, WIDTH), jnp.bfloat16, sharding=rows)
  jitted = jax.jit(step, donate_argnums=(0,) if donate else (), out_shardings=((cut, cut), whole))
  return jitted.lower(ws, x)


STATE = 2 * LAYERS * WIDTH * FFN * 2 // 4  # Bytes on one of four devices.
# Of one device: two products a layer forward, and two for the gradients of each.
FLOPS = 6 * LAYERS * 2 * (BATCH // 4) * WIDTH * FFN


def facts(flops: float = 4.0 * FLOPS) -> result.Facts:
  return result.Facts(
    name="toy",
    parameters=2 * LAYERS * WIDTH * FFN,
    state_bytes=STATE,
    state_arrays=2,
    tokens=BATCH,
    model_flops=flops,
    steps=1000,
    fsdp=4,
    examples=BATCH // 4,
  )


def plan_of(tpu, scanned: bool = True, **changes) -> result.Plan:
  topology, devices = tpu
  made = program.compile_lowered(lowered(devices, scanned, **changes))
  return result.Plan.of(facts(), topology, devices, made)


def test_a_scanned_step_has_the_flops_of_an_unrolled_one_on_a_tpu(tpu):
  scanned, unrolled = plan_of(tpu), plan_of(tpu, scanned=False)
  assert scanned.program_flops == pytest.approx(FLOPS, rel=0.01)
  assert unrolled.program_flops == pytest.approx(scanned.program_flops, rel=0.01)
  # XLA's own count sees the body once: that is why there is another.
  with program._uncached():
    compiled = lowered(tpu[1], scanned=True).compile()
  assert compiled.cost_analysis()["flops"] < 0.6 * FLOPS


def test_a_plan_tells_memory_donation_and_collectives(tpu):
  plan = plan_of(tpu)
  assert plan.fits and plan.donated and not plan.refusal()
  assert plan.memory.aliased == STATE
  assert STATE < plan.memory.peak < 8 * STATE
  assert not plan_of(tpu, donate=False).donated
  sums = collectives.by_kind(plan.collectives)
  weights = 2 * WIDTH * FFN * 2 * LAYERS  # Bytes of all.
  gathered = sum(found["bytes"] for (kind, *_), found in sums.items() if kind == "all-gather")
  assert gathered in (weights, 2 * weights)  # Once for each pass, or kept from the first.
  assert not plan.unknown_loops and not plan.kernels


def test_kernels_have_the_flops_that_are_given(tpu):
  topology, devices = tpu
  made = program.compile_lowered(lowered(devices, scanned=True))
  given = dataclasses.replace(facts(), kernel_flops=4e9, padding_flops=8e9)
  plan = result.Plan.of(given, topology, devices, made)
  assert plan.program_flops == pytest.approx(FLOPS + 1e9, rel=0.01)
  assert plan.roofline.compute * topology.chip.peak == pytest.approx(FLOPS + 3e9, rel=0.01)
  with_kernel = dataclasses.replace(plan, kernels={"splash": 3})
  assert "counted as they were given: splash 3 times" in tables.table(with_kernel)


def test_a_plan_is_told_and_written(tpu):
  plan = plan_of(tpu)
  told = tables.table(plan)
  for part in ("toy on v5e:2x2, 4 chips", "donated      yes", "all-gather", "bound by", "MFU"):
    assert part in told, part
  written = json.loads(plan.to_json())
  assert written["fits"] and written["topology"]["chips"] == 4
  assert written["memory"]["peak"] == plan.memory.peak
  assert written["roofline"]["bound"] == plan.roofline.bound
  assert written["all_overlaps"]["seconds"] <= written["nothing_overlaps"]["seconds"]
  assert set(written["versions"]) == {"jax", "jaxlib", "libtpu"}


def test_what_does_not_fit_is_told_by_how_much_and_what_to_change(tpu):
  plan = plan_of(tpu, batch=2**26)
  assert plan.overflow and not plan.fits
  assert plan.overflow.available == pytest.approx(tpu[0].chip.usable, rel=0.001)
  assert plan.memory.aliased == STATE and plan.memory.peak == plan.overflow.needed
  refusal = plan.refusal()
  assert f"{plan.overflow.excess / GIB:,.2f} GiB too much" in refusal
  assert "remat full" in refusal and "accumulation" in refusal and "fsdp" not in refusal
  assert plan.largest and plan.largest[0].bytes > GIB
  assert refusal in tables.table(plan) and json.loads(plan.to_json())["refusal"] == refusal


def test_another_failure_of_the_compiler_is_no_matter_of_memory():
  class Broken:
    def compile(self, compiler_options):
      raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

  with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
    program.compile_lowered(Broken())


def test_the_state_is_cut_first_where_it_is_the_larger_part(tpu):
  plan = plan_of(tpu, batch=2**26)
  large = dataclasses.replace(facts(), state_bytes=12 * GIB, fsdp=2, recomputes_all=True)
  ways = dataclasses.replace(plan, facts=large).ways()
  assert "12.00 GiB" in ways[0] and "fsdp" in ways[0]
  assert not any("remat" in way for way in ways)
  small = dataclasses.replace(large, state_bytes=GIB, examples=1)
  ways = dataclasses.replace(plan, facts=small).ways()
  assert "fsdp" in ways[0] and not any("accumulation" in way for way in ways)


@pytest.mark.parametrize("name, slices", [("v5p:2x2x1", 2), ("7x:2x2x1", 1)])
def test_slices_and_half_chips_are_planned_for(
  name: str, slices: int, monkeypatch: pytest.MonkeyPatch
):
  pytest.importorskip("libtpu", reason="compiling for a TPU takes its compiler")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  topology = topologies.parse(name, slices)
  devices = topologies.devices(topology)
  made = program.compile_lowered(lowered(devices, scanned=True))
  plan = result.Plan.of(facts(), topology, devices, made)
  assert len(devices) == topology.devices == 8
  # All products of a step, on eight devices.
  assert matmuls.flops(made.module) == pytest.approx(FLOPS / 2, rel=0.01)
  networks = {one.network for one in plan.collectives}
  assert networks == ({"ICI", "DCN"} if slices > 1 else {"ICI"})


def test_a_shape_that_libtpu_refuses_is_told(tpu):
  with pytest.raises(topologies.errors.CalmError, match="knows no topology 'v5e:3x3'"):
    topologies.devices(topologies.parse("v5e:3x3"))
