"""Claims about compiling ahead: the real programs for TPUs that are absent, and their plans."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import jax
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from calm_jax import config, errors
from calm_jax.kernels import cross_entropy
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.planning import comparison, result, search, steps, tables
from calm_jax.planning.compiled import runs, topologies
from calm_jax.running import counting
from calm_jax.stages import autoencoder as autoencoder_stage
from calm_jax.stages import calm as calm_stage
from calm_jax.stages import transformer as transformer_stage

ROOT = pathlib.Path(__file__).parent.parent
VOCAB = 512
SIZES: dict[str, Any] = dict(layers=2, width=128, ffn=256, heads=2, kv_heads=2)
AUTOENCODER = config.Autoencoder(width=64, ffn=128, latent=16)
PARENTS = {"autoencoder": autoencoder_stage.Run(model=AUTOENCODER)}
CALM = calm_stage.Run(
  data=config.Data(context=512),
  model=config.Backbone(**SIZES),
  head=config.Head(blocks=1, noise=16),
  loss=config.CalmLoss(samples=4, posterior_draws=4),
  training=config.Training(batch=128, eval_blocks=8),
)
BASELINE = transformer_stage.Run(
  data=config.Data(context=128),
  model=config.Transformer(**SIZES),
  training=config.Training(batch=8, eval_blocks=8),
)


@pytest.fixture(scope="module", autouse=True)
def libtpu():
  pytest.importorskip("libtpu", reason="compiling for a TPU needs its compiler")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    yield


def job(run: config.Run, topology: str = "v5e:2x2", slices: int = 1) -> steps.PlanJob:
  return steps.PlanJob("toy", run, topologies.parse(topology, slices), VOCAB, PARENTS)


def changed(run: config.Run, **parts) -> config.Run:
  return dataclasses.replace(
    run, **{part: dataclasses.replace(getattr(run, part), **new) for part, new in parts.items()}
  )


@pytest.fixture(scope="module")
def calm_plan(libtpu) -> result.Plan:
  return steps.train_plan(job(CALM))


def test_the_step_is_the_real_one(calm_plan: result.Plan):
  facts = calm_plan.facts
  assert calm_plan.fits and calm_plan.donated and not calm_plan.unknown_loops
  assert facts.choices["attention"] == "splash" and facts.tokens == 128 * 512
  # Parameters and both of Adam's moments in float32, over four chips; vectors are replicated.
  assert 12 * facts.parameters / 4 < facts.state_bytes < 13 * facts.parameters / 4
  assert sorted(calm_plan.kernels.values()) == [2, 2]  # Forward and backward, a layer.


def test_the_program_computes_what_is_counted(calm_plan: result.Plan):
  counted = counting.program_per_token(CALM, PARENTS, VOCAB) * calm_plan.facts.tokens / 4
  assert calm_plan.program_flops == pytest.approx(counted, rel=0.01)


def test_examples_stay_on_their_devices(calm_plan: result.Plan):
  """Otherwise activations are sent, which have more bytes than all parameters at this batch."""
  weights = 4 * calm_plan.facts.parameters
  sent = sum(collective.total_bytes for collective in calm_plan.collectives)
  activation = 128 * 4 * 128 * 128 * 2  # An activation of the head, for all examples.
  assert activation > 3 * weights / 2
  assert sent < 6 * weights
  assert calm_plan.memory.temporaries < 30 * activation / 4


@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v6e:4x4"])
def test_an_axis_of_the_torus_may_be_divided(topology: str):
  devices = topologies.devices(topologies.parse(topology, 1))
  mesh = mesh_lib.build(config.Mesh(data=2), devices)
  assert tuple(mesh.shape.values()) == (2, len(devices) // 2, 1, 1)
  assert set(mesh.devices.flat) == set(devices)


def test_unrolled_and_scanned_baselines_compute_what_is_counted():
  check = steps.check_flops(job(BASELINE))
  assert all(ratio == pytest.approx(1, abs=0.01) for ratio in check.ratios.values())


def test_the_table_of_the_cross_entropy_is_gathered_once_for_all_positions():
  mesh = mesh_lib.build(config.Mesh(fsdp=4), topologies.devices(topologies.parse("v5e:2x2")))
  sharded = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
  rows = NamedSharding(mesh, mesh_lib.spec("batch"))
  positions = (8, 2 * cross_entropy.CHUNK)  # Two examples a device: four chunks.
  inputs = [
    jax.ShapeDtypeStruct((1024, 512), jnp.float32, sharding=sharded),
    jax.ShapeDtypeStruct((*positions, 512), jnp.bfloat16, sharding=rows),
    jax.ShapeDtypeStruct(positions, jnp.int32, sharding=rows),
    jax.ShapeDtypeStruct(positions, jnp.float32, sharding=rows),
  ]
  with jax.set_mesh(mesh):
    gradient = jax.grad(lambda *inputs: cross_entropy.scores(*inputs).loss)
    compiled = jax.jit(gradient, out_shardings=sharded).lower(*inputs).compile()
  running = runs.read(compiled.as_text()).running()
  opcodes = ("all-gather", "all-gather-start")
  gathers = [n for _, instruction, n in running if instruction.opcode in opcodes]
  assert gathers == [1]


def test_evaluation_and_decoding_compile():
  plans = {"evaluation": steps.evaluation_plan(job(BASELINE)), **steps.decode_plans(job(CALM))}
  assert set(plans) == {"evaluation", "prompt", "patch"}
  assert all(plan.fits and plan.memory.peak > 0 for plan in plans.values())
  assert plans["evaluation"].facts.tokens == 8 * 128
  assert "toy, decode: patch" in tables.lines(list(plans.values()))


def test_slices_talk_over_their_network():
  run = changed(BASELINE, mesh={"data": 2, "sequence": 1})
  plan = steps.train_plan(job(run, slices=2))
  assert {collective.network for collective in plan.collectives} == {"ICI", "DCN"}
  assert plan.facts.choices["mesh.data"] == 2 and plan.topology.chips == 8


def test_sizes_that_do_not_divide_are_refused():
  with pytest.raises(errors.CalmError, match="slices: give --config"):
    job(CALM, slices=2)
  with pytest.raises(errors.CalmError, match=r"multiple of accumulation . data . fsdp = 4"):
    job(changed(CALM, training={"batch": 6}))
  with pytest.raises(errors.CalmError, match="needs a multiple of 3 devices and there are 4"):
    job(changed(CALM, mesh={"data": 3}))
  with pytest.raises(errors.CalmError, match="generates no text"):
    steps.decode_plans(job(dataclasses.replace(PARENTS["autoencoder"], data=CALM.data)))


# The act.


def act(*words: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-m", "calm_jax.compile_ahead", *words],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    env=dict(os.environ),
  )


TOY = ("--config=configs/transformer.py:quickstart", f"--vocab_size={VOCAB}")


def test_the_act_prints_a_table_and_writes_json(tmp_path: pathlib.Path):
  path = tmp_path / "plan.json"
  flags = ("--topology=v5e:2x2", "--config.model.layers=1", "--config.mesh.fsdp=-1")
  done = act(*TOY, *flags, f"--output={path}")
  assert done.returncode == 0, done.stderr
  name = "configs/transformer.py:quickstart model.layers=1 mesh.fsdp=-1"
  for part in (f"{name} on v5e:2x2, 4 chips", "peak", "bound by", "days for 1,500 steps"):
    assert part in done.stdout
  written = json.loads(path.read_text())
  assert written["fits"] and written["facts"]["choices"]["mesh.fsdp"] == 4
  assert written["facts"]["tokens"] == 4 * 256
  row = comparison.table(comparison.read(str(tmp_path / "*.json"))).splitlines()[-1]
  assert row.startswith("| transformer.py:quickstart model.layers=1 | v5e:2x2 | fsdp=4 | yes |")


def test_a_step_that_does_not_fit_ends_in_a_line_that_says_what_to_change():
  done = act(*TOY, "--topology=v5e:2x2", "--config.training.batch=65536")
  assert done.returncode == errors.EXIT_BAD_INPUT
  last = done.stderr.strip().splitlines()[-1]
  assert "does not fit v5e" in last and "too much; " in last and "remat full" in last


def test_the_error_for_an_unknown_topology_lists_valid_ones():
  done = act(*TOY, "--topology=v9:2x2")
  assert done.returncode == errors.EXIT_BAD_INPUT
  assert done.stderr.strip().splitlines()[-1].startswith("error: unknown chip 'v9'")
  assert "v5p:8x8x16" in done.stderr and "Traceback" not in done.stderr


# The search, with invented plans.


def invent_plans(monkeypatch: pytest.MonkeyPatch, needed) -> list[search.Layout]:
  """Has a plan need `needed(layout)` GiB of 16 and its predicted cost as time; records layouts."""
  tried: list[search.Layout] = []

  def plan(job: steps.PlanJob):
    run = job.run
    layout = search.Layout(run.mesh, run.training.accumulation, run.execution.remat)
    tried.append(layout)
    peak = needed(layout) * result.GIB
    fits = peak <= 16 * result.GIB
    roofline = types.SimpleNamespace(bound="compute", fastest=layout.cost, slowest=2 * layout.cost)
    return types.SimpleNamespace(
      fits=fits,
      roofline=roofline,
      memory=types.SimpleNamespace(peak=peak),
      facts=types.SimpleNamespace(state_bytes=result.GIB // 4),
      overflow=None if fits else types.SimpleNamespace(available=16 * result.GIB),
      refusal=lambda: "by far too much",
    )

  monkeypatch.setattr(steps, "train_plan", plan)
  return tried


def test_a_layout_that_fits_at_once_ends_the_search(monkeypatch: pytest.MonkeyPatch):
  tried = invent_plans(monkeypatch, lambda layout: 1)
  trials = search.search(job(CALM), 12, lambda line: None)
  assert tried == [search.Layout(config.Mesh(1, 4), 1, "none")]
  flags = "--config.mesh.fsdp=4 --config.training.accumulation=1 --config.execution.remat=none"
  assert search.table(trials).endswith(flags)


def test_the_fastest_that_fits_is_recommended_and_leaner_ones_are_not_tried(
  monkeypatch: pytest.MonkeyPatch,
):
  def needed(layout: search.Layout) -> float:
    sizes = {"none": 60, "dots": 40, "named": 36, "offload": 30, "full": 20}
    return sizes[layout.remat] / layout.accumulation

  tried = invent_plans(monkeypatch, needed)
  trials = search.search(job(CALM), 40, lambda line: None)
  fitting = [trial for trial in trials if trial.fits]
  best = min(fitting, key=lambda trial: trial.layout.cost)
  assert (best.layout.accumulation, best.layout.remat) == (4, "none")
  assert best.layout.flags in search.table(trials).splitlines()[-1]
  assert len(tried) < 25
  for layout in tried:  # None keeps as much as one that was refused before it on its mesh.
    before = tried[: tried.index(layout)]
    assert not any(layout.keeps_at_least(other) for other in before if needed(other) > 16)


def test_where_nothing_fits_the_leanest_layout_is_named(monkeypatch: pytest.MonkeyPatch):
  invent_plans(monkeypatch, lambda layout: 1000)
  trials = search.search(job(CALM), 3, lambda line: None)
  assert len(trials) == 3 and search.nearest(trials) == "by far too much"
  assert "Fastest" not in search.table(trials)
