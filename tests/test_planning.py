"""Claims about plans: memory, traffic, roofline, and steps compiled for TPUs that are absent."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from calm_jax.planning import result, tables
from calm_jax.planning.compiled import (
  collectives,
  matmuls,
  memory,
  program,
  roofline,
  runs,
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


def test_a_refusal_is_parsed():
  overflow = memory.overflow(REFUSAL)
  assert overflow
  assert overflow.needed == int(18.37 * GIB) and overflow.available == int(15.75 * GIB)
  assert overflow.excess == overflow.needed - overflow.available
  assert memory.overflow("INTERNAL: something else (12.5G)") is None


def test_the_peak_counts_donated_arrays_once():
  state, batch, metrics, temporaries = 1000, 10, 1, 500
  donated = memory.Memory(state + batch, state + metrics, state, temporaries)
  not_donated = dataclasses.replace(donated, aliased=0)
  assert donated.peak == state + batch + metrics + temporaries
  assert not_donated.peak == donated.peak + state


def test_donation_and_arguments_are_parsed_from_the_text():
  def step(state, x):
    return jax.tree.map(lambda s: s + x.sum(), state), x.mean()

  state = {"a": jnp.zeros((8, 16)), "b": jnp.zeros(32)}
  lowered = jax.jit(step, donate_argnums=0).lower(state, jnp.ones(64))
  compiled = lowered.compile()
  module = runs.read(compiled.as_text())
  assert sorted(memory.aliases(module)) == [((0,), 0), ((1,), 1)]
  reported = memory.memory_of(compiled)
  assert reported.aliased == (8 * 16 + 32) * 4
  needed = reported.arguments + reported.values - reported.aliased + 1000
  parsed = memory.memory_of_refused(module, memory.Overflow(needed, 10))
  assert (parsed.arguments, parsed.values, parsed.aliased) == (
    (8 * 16 + 32 + 64) * 4,
    (8 * 16 + 32 + 1) * 4,
    (8 * 16 + 32) * 4,
  )
  assert parsed.peak == needed
  not_donated = runs.read(jax.jit(step).lower(state, jnp.ones(64)).compile().as_text())
  assert memory.aliases(not_donated) == []


def test_the_largest_buffers_are_parsed():
  report = """Total bytes: 53299141632 (49.64GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
   33.06GiB( 67%);   33.06GiB;  17750294528;                2; s32[94208,94208]
   49.59GiB(100%);       512B;            0;                2; bf16[94208,94208], pred[]
  """
  assert memory.largest(report) == [
    memory.Buffer(int(33.06 * GIB), "s32[94208,94208]"),
    memory.Buffer(512, "bf16[94208,94208], pred[]"),
  ]


def test_temporaries_are_those_of_the_compilers_own_report():
  compiled = jax.jit(lambda x: 2 * x).lower(jnp.ones(64)).compile()
  lines = ["Memory Space: default (color=0)", "Total bytes: 1512 (1.5KiB)", ""]
  vmem = ["Memory Space: vmem (color=1)", "Total bytes: 9999 (9.8KiB)"]
  sizes = memory.memory_of(compiled, "\n".join(lines + vmem))
  assert (sizes.peak, sizes.temporaries) == (1512, 1000)  # 64 numbers in, 64 out.


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


def test_slices_move_only_their_bytes_and_memory_on_the_chip_is_free():
  row, number = 256 * 4, 4
  slicing = row + number + row  # Reads the row and its number, writes the row.
  tanh = row  # Reads the row; its value stays on the chip.
  updating = number + row  # Reads the number; writes the row from the chip, in place.
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


def test_a_device_has_its_share_of_a_chip():
  times = roofline.roofline(topologies.CHIPS["7x"], 2307e12 / 2, 7380e9 / 2, [])
  assert (times.compute, times.memory) == pytest.approx((1.0, 1.0))


def test_mfu_counts_the_models_flops_not_the_programs():
  topology = topologies.parse("v5e:4x4")
  speed = roofline.speed(topology, 2.0, tokens=1000, model_flops=16 * 197e12, steps=43_200)
  assert speed.tokens_per_second == 500 and speed.mfu == pytest.approx(0.5)
  assert speed.days == 1.0


# Steps compiled for a TPU.


@pytest.fixture
def tpu(monkeypatch: pytest.MonkeyPatch):
  """A topology of 2x2 chips, and its devices."""
  pytest.importorskip("libtpu", reason="compiling for a TPU needs its compiler")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  topology = topologies.parse("v5e:2x2")
  return topology, topologies.devices(topology)


def lowered(devices, scanned: bool, batch: int = BATCH, donate: bool = True):
  """A step of gradient descent on a chain of products, with its state sharded."""
  mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
  sharded, rows = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P("fsdp"))
  replicated = NamedSharding(mesh, P())

  def loss(ws, x):
    def layer(x, w):
      w = jax.tree.map(lambda w: jax.lax.with_sharding_constraint(w, replicated), w)
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
  ws = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharded) for shape in shapes)
  x = jax.ShapeDtypeStruct((batch, WIDTH), jnp.bfloat16, sharding=rows)
  out = ((sharded, sharded), replicated)
  jitted = jax.jit(step, donate_argnums=(0,) if donate else (), out_shardings=out)
  return jitted.lower(ws, x)


STATE = 2 * LAYERS * WIDTH * FFN * 2 // 4  # Bytes on one of four devices.
# FLOPs of one device: two products a layer forward, and two for the gradients of each.
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
  # XLA's own count has the loop's body once.
  with program._uncached():
    compiled = lowered(tpu[1], scanned=True).compile()
  assert compiled.cost_analysis()["flops"] < 0.6 * FLOPS


def test_a_plan_has_memory_donation_and_collectives(tpu):
  plan = plan_of(tpu)
  assert plan.fits and plan.donated and not plan.refusal()
  assert plan.memory.aliased == STATE
  assert STATE < plan.memory.peak < 8 * STATE
  assert not plan_of(tpu, donate=False).donated
  sums = collectives.by_kind(plan.collectives)
  weights = 2 * WIDTH * FFN * 2 * LAYERS  # Bytes.
  gathered = sum(row["bytes"] for (kind, *_), row in sums.items() if kind == "all-gather")
  assert gathered in (weights, 2 * weights)  # Once for both passes, or once for each.
  assert not plan.unknown_loops and not plan.kernels


def test_kernels_have_the_flops_of_the_facts(tpu):
  topology, devices = tpu
  made = program.compile_lowered(lowered(devices, scanned=True))
  counted = dataclasses.replace(facts(), kernel_flops=4e9, padding_flops=8e9)
  plan = result.Plan.of(counted, topology, devices, made)
  assert plan.program_flops == pytest.approx(FLOPS + 1e9, rel=0.01)
  assert plan.roofline.compute * topology.chip.peak == pytest.approx(FLOPS + 3e9, rel=0.01)
  with_kernel = dataclasses.replace(plan, kernels={"splash": 3})
  assert "counted analytically: splash 3 times" in tables.table(with_kernel)


def test_a_plan_is_printed_and_written(tpu):
  plan = plan_of(tpu)
  table = tables.table(plan)
  for part in ("toy on v5e:2x2, 4 chips", "donated      yes", "all-gather", "bound by", "MFU"):
    assert part in table, part
  written = json.loads(plan.to_json())
  assert written["fits"] and written["topology"]["chips"] == 4
  assert written["memory"]["peak"] == plan.memory.peak
  assert written["roofline"]["bound"] == plan.roofline.bound
  assert written["all_overlaps"]["seconds"] <= written["nothing_overlaps"]["seconds"]
  assert set(written["versions"]) == {"jax", "jaxlib", "libtpu"}


def test_a_refusal_says_how_much_is_missing_and_what_to_change(tpu):
  plan = plan_of(tpu, batch=2**26)
  assert plan.overflow and not plan.fits
  assert plan.overflow.available == pytest.approx(tpu[0].chip.usable, rel=0.001)
  assert plan.memory.aliased == STATE and plan.memory.peak == plan.overflow.needed
  refusal = plan.refusal()
  assert f"{plan.overflow.excess / GIB:,.2f} GiB too much" in refusal
  assert "remat full" in refusal and "accumulation" in refusal and "fsdp" not in refusal
  assert plan.largest and plan.largest[0].bytes > GIB
  assert refusal in tables.table(plan) and json.loads(plan.to_json())["refusal"] == refusal


def test_other_failures_of_the_compiler_are_raised():
  class Broken:
    def compile(self, compiler_options):
      raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

  with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
    program.compile_lowered(Broken())


def test_sharding_the_state_comes_first_where_it_is_the_larger_part(tpu):
  plan = plan_of(tpu, batch=2**26)
  large = dataclasses.replace(facts(), state_bytes=12 * GIB, fsdp=2, recomputes_all=True)
  remedies = dataclasses.replace(plan, facts=large).remedies()
  assert "12.00 GiB" in remedies[0] and "fsdp" in remedies[0]
  assert not any("remat" in remedy for remedy in remedies)
  small = dataclasses.replace(large, state_bytes=GIB, examples=1)
  remedies = dataclasses.replace(plan, facts=small).remedies()
  assert "fsdp" in remedies[0] and not any("accumulation" in remedy for remedy in remedies)


@pytest.mark.parametrize("name, slices", [("v5p:2x2x1", 2), ("7x:2x2x1", 1)])
def test_several_slices_and_devices_of_half_a_chip(
  name: str, slices: int, monkeypatch: pytest.MonkeyPatch
):
  pytest.importorskip("libtpu", reason="compiling for a TPU needs its compiler")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  topology = topologies.parse(name, slices)
  devices = topologies.devices(topology)
  made = program.compile_lowered(lowered(devices, scanned=True))
  plan = result.Plan.of(facts(), topology, devices, made)
  assert len(devices) == topology.devices == 8
  # All products of a step, divided by eight devices.
  assert matmuls.flops(made.module) == pytest.approx(FLOPS / 2, rel=0.01)
  networks = {collective.network for collective in plan.collectives}
  assert networks == ({"ICI", "DCN"} if slices > 1 else {"ICI"})


def test_the_error_for_a_shape_that_libtpu_refuses_names_it(tpu):
  with pytest.raises(topologies.errors.CalmError, match="knows no topology 'v5e:3x3'"):
    topologies.devices(topologies.parse("v5e:3x3"))
