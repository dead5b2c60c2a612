"""Helper of tests of FLOPs: compiles a run's training step and counts its products."""

from collections.abc import Mapping

import jax

from calm_jax import config
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.planning.compiled import matmuls, runs
from calm_jax.running import untrained
from calm_jax.stages import table
from calm_jax.training import program


def step_flops(run: config.Run, parents: Mapping[str, config.Run], vocab_size: int) -> float:
  """Returns the FLOPs of a run's compiled training step, on one device."""
  functions = untrained.functions(run, parents, vocab_size, untrained.abstract)
  mesh = mesh_lib.build(run.mesh, jax.devices()[:1])
  with jax.set_mesh(mesh):
    fields = table.of(run).fields(run)
    compiled = program.TrainProgram(run, functions, mesh, fields).compiled_plain_step()
  return matmuls.flops(runs.read(compiled.as_text()))
