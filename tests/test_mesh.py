"""Claims about meshes and rules: how arrays are divided, and what is refused."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from test_layouts import AUTOENCODER, RUNS, VOCAB, built

from calm_jax import config, errors
from calm_jax.data import pipeline
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.parallel import rules
from calm_jax.running import untrained
from calm_jax.stages import autoencoder as autoencoder_stage
from calm_jax.stages import calm as calm_stage
from calm_jax.stages import transformer as transformer_stage
from calm_jax.training import program


@dataclasses.dataclass(frozen=True)
class Device:
  """The attributes of a device that building a mesh reads."""

  id: int
  process_index: int
  slice_index: int
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"

  @property
  def coords(self) -> tuple[int, int, int]:
    return (self.id % 4, 0, 0)

  core_on_chip = 0


@pytest.mark.parametrize(
  ("settings", "expected"),
  [
    (config.Mesh(), (1, 8, 1, 1)),
    (config.Mesh(data=-1, fsdp=2), (4, 2, 1, 1)),
    (config.Mesh(data=2, fsdp=1, sequence=-1, tensor=2), (2, 1, 2, 2)),
    (config.Mesh(fsdp=2), (1, 2, 1, 1)),
  ],
)
def test_one_axis_takes_the_rest_of_the_devices(settings, expected):
  assert tuple(mesh_lib.sizes(settings, 8).values()) == expected


def test_a_mesh_that_does_not_divide_the_devices_is_refused():
  with pytest.raises(errors.CalmError, match=r"fsdp=3.* multiple of 3 devices .* are 8: change"):
    mesh_lib.sizes(config.Mesh(fsdp=3), 8)
  with pytest.raises(errors.CalmError, match="data and fsdp are -1: only one axis"):
    config.Mesh(data=-1)


def test_slices_are_divided_by_data():
  devices = [Device(i, i // 4, i // 4) for i in range(8)]
  mesh = mesh_lib.build(config.Mesh(data=-1, fsdp=4), devices)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}
  for number, row in enumerate(mesh.devices):
    assert {device.slice_index for device in row.flat} == {number}
  with pytest.raises(errors.CalmError, match=r"there are 2 slices.*--config\.mesh\.data=2"):
    mesh_lib.build(config.Mesh(), devices)


def test_a_mesh_of_several_processes_leaves_no_device_out():
  devices = [Device(i, i // 4, 0) for i in range(8)]
  with pytest.raises(errors.CalmError, match="has 4 devices, but the 2 processes have 8"):
    mesh_lib.build(config.Mesh(fsdp=4), devices)


def test_a_process_reads_the_rows_of_its_devices():
  mesh = mesh_lib.build(config.Mesh(data=2, fsdp=2, tensor=2))
  rows = mesh_lib.own_rows(mesh, 8)
  np.testing.assert_array_equal(rows, np.arange(8))
  placed = mesh_lib.place_rows(mesh, {"x": np.arange(16).reshape(8, 2)}, rows, 8)["x"]
  np.testing.assert_array_equal(placed, np.arange(16).reshape(8, 2))
  assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}


@pytest.mark.parametrize("name", RUNS)
def test_each_parameter_matches_one_rule(name):
  mesh = mesh_lib.build(config.Mesh(fsdp=4, tensor=2))
  made = program.TrainProgram(RUNS[name], built(RUNS[name]), mesh, pipeline.fields(32))
  for tree in (made.state, made.frozen):
    for path, _ in jax.tree.leaves_with_path(tree):
      assert len(rules.matching(rules.path_name(path))) == 1, rules.path_name(path)
  with pytest.raises(errors.CalmError, match="parameter head/novel matches 0 rows"):
    rules.spec("head/novel", (2, 2), mesh)


def published() -> dict[str, program.TrainProgram]:
  """Programs of the published models on all devices, by shapes only."""
  mesh = mesh_lib.build(config.Mesh())
  runs = {
    "calm": calm_stage.Run(model=config.Backbone(width=2560, ffn=6880)),
    "base": transformer_stage.Run(),
  }
  parents = {"autoencoder": autoencoder_stage.Run()}
  return {
    name: program.TrainProgram(
      run,
      untrained.functions(run, parents, 128_256, untrained.abstract),
      mesh,
      pipeline.fields(2048),
    )
    for name, run in runs.items()
  }


def test_almost_all_bytes_of_the_published_models_are_sharded():
  for made in published().values():
    mesh = made.mesh
    assert rules.require_sharded(made.state.params, mesh) < 0.001
    by_device = sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(made.state)
    )
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made.state))
    assert by_device < 1.01 * whole / mesh.size


def test_parameters_that_fsdp_can_not_divide_are_refused():
  mesh = mesh_lib.build(config.Mesh())
  tree = {"embed": {"embedding": jax.ShapeDtypeStruct((32_000, 1001), np.float32)}}
  with pytest.raises(
    errors.CalmError, match=r"100.0% .* divided by fsdp=8.*embedding \[32000, 1001"
  ):
    rules.require_sharded(tree, mesh)
  tree = {"embed": {"embedding": jax.ShapeDtypeStruct((320, 1001), np.float32)}}
  assert rules.require_sharded(tree, mesh) == 1  # So few bytes may be undivided.


@pytest.mark.parametrize(
  ("name", "mesh"),
  [
    ("energy", config.Mesh(fsdp=1, sequence=8)),
    ("transformer", config.Mesh(data=8, fsdp=1)),
    ("transformer", config.Mesh(fsdp=1, tensor=8)),
  ],
)
def test_a_mesh_that_divides_the_sizes_is_accepted(name, mesh):
  run = dataclasses.replace(RUNS[name], mesh=mesh)
  program.require_divisible(run, 8, run.model, mesh_lib.build(mesh))


def test_a_mesh_that_does_not_divide_the_sizes_is_refused():
  run, sizes = RUNS["transformer"], config.Mesh(fsdp=2, tensor=4)
  model = dataclasses.replace(run.model, heads=8, kv_heads=2)
  few = dataclasses.replace(run, model=model)
  with pytest.raises(errors.CalmError, match=r"tensor must divide model\.kv_heads = 2, got 4"):
    program.require_divisible(few, 32, few.model, mesh_lib.build(sizes))
  with pytest.raises(errors.CalmError, match="sequence must divide the 31 positions"):
    program.require_divisible(run, 31, run.model, mesh_lib.build(config.Mesh(sequence=2)))
  training = dataclasses.replace(run.training, batch=24, accumulation=2)
  odd = dataclasses.replace(run, training=training)
  with pytest.raises(errors.CalmError, match=r"accumulation \* data \* fsdp = 16 .*, got 24"):
    program.require_divisible(odd, 32, odd.model, mesh_lib.build(config.Mesh()))


def test_the_table_lists_every_parameter():
  mesh = mesh_lib.build(config.Mesh())
  made = program.TrainProgram(
    RUNS["autoencoder"], built(RUNS["autoencoder"]), mesh, pipeline.fields(32)
  )
  text = rules.table(rules.placed(made.state.params, mesh))
  assert f"embed/embedding  [{VOCAB}, {AUTOENCODER.width}]  token table" in text
  assert text.count("\n") + 1 == len(jax.tree.leaves(made.state.params))
