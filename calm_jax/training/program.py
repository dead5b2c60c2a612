"""A stage and a mesh -> the compiled train step, with the sharding of its arguments and results."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from calm_jax import config
from calm_jax.data import pipeline
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.parallel import rules
from calm_jax.training import feed, step
from calm_jax.training import stage as stage_lib

Tree = Any


def memory_line(compiled: jax.stages.Compiled) -> str:
  """Returns a line on the memory that a compiled step needs on each device."""
  analysis = compiled.memory_analysis()
  if analysis is None:
    return "this platform does not report a program's memory"
  sizes = {
    "arguments": analysis.argument_size_in_bytes,
    "temporaries": analysis.temp_size_in_bytes,
    "results in place of arguments": analysis.alias_size_in_bytes,
  }
  return "memory a device: " + ", ".join(f"{name} {x / 2**30:.3f} GiB" for name, x in sizes.items())


def require_divisible(
  run: config.Run,
  positions: int,
  transformer: config.Transformer | None,
  mesh: jax.sharding.Mesh,
) -> None:
  """Raises CalmError unless the mesh divides a run's batch, positions and heads evenly.

  Args:
    positions: P, positions per example.
    transformer: sizes of the stage's Transformer, if it has one.
  """
  rows, parts = run.training.batch, run.training.accumulation * mesh_lib.row_parts(mesh)
  config.require(
    rows % parts == 0,
    f"config.training.batch must be a multiple of accumulation * data * fsdp = {parts} on this "
    f"mesh, got {rows}",
  )
  sequence, tensor = mesh.shape["sequence"], mesh.shape["tensor"]
  config.require(
    positions % sequence == 0,
    f"config.mesh.sequence must divide the {positions} positions of an example, got {sequence}",
  )
  heads = transformer.kv_heads if transformer else tensor
  config.require(
    heads % tensor == 0,
    f"config.mesh.tensor must divide model.kv_heads = {heads}, got {tensor}",
  )


@dataclasses.dataclass(frozen=True)
class TrainProgram:
  """A stage's functions on a mesh.

  `state` and `batch` are abstract, with the sharding of every array. The step donates its
  state.

  Attributes:
    fields: fields of an example of a training batch.
  """

  run: config.Run
  stage: stage_lib.Stage
  mesh: jax.sharding.Mesh
  fields: Mapping[str, pipeline.Field]

  @property
  def _replicated(self) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec())

  def _new(self, params: Tree) -> step.TrainState:
    return step.new_state(params, self.run.optimizer)

  @functools.cached_property
  def state(self) -> step.TrainState:
    # Abstract, since the mesh may consist of devices that are not attached.
    state = jax.eval_shape(lambda: self._new(self.stage.init(jax.random.key(0))))
    return rules.abstract(state, self.mesh)

  @functools.cached_property
  def frozen(self) -> Tree:
    return rules.abstract(self.stage.frozen, self.mesh)

  @property
  def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    return feed.abstract_batch(self.fields, self.mesh, self.run.training.batch)

  @property
  def signals(self) -> jax.ShapeDtypeStruct:
    shape = (self.mesh.size, len(step.SIGNALS))
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=mesh_lib.on_each(self.mesh))

  def place_signals(self, raised: Collection[str] = ()) -> jax.Array:
    """Returns the array of signals, with `raised` set on this process's devices."""
    return mesh_lib.place_on_each(
      self.mesh, np.array([name in raised for name in step.SIGNALS], np.int32)
    )

  def blank_batch(self) -> dict[str, jax.Array]:
    """Returns a batch of zeros, for void steps."""
    return feed.blank_batch(self.fields, self.mesh, self.run.training.batch)

  def initial(self, params: Tree = None) -> step.TrainState:
    """Returns the state before the first step, from `params` or the stage's initial values."""
    shardings = jax.tree.map(lambda x: x.sharding, self.state)
    if params is not None:
      return jax.jit(self._new, out_shardings=shardings)(params)
    key = jax.random.key(self.run.training.seed)
    init = jax.jit(lambda key: self._new(self.stage.init(key)), out_shardings=shardings)
    return init(key)

  def compiled_step(self) -> jax.stages.Compiled:
    """Returns the loop's step: (state, frozen, batch, signals) -> (state, metrics)."""
    return self.lowered_step().compile()

  def lowered_step(self) -> jax.stages.Lowered:
    """Returns the loop's step, lowered but not compiled."""
    take_step = step.with_signals(self._take_step)
    return self._jitted(take_step).lower(self.state, self.frozen, self.batch, self.signals)

  def compiled_plain_step(self) -> jax.stages.Compiled:
    """Returns the step without signals: (state, frozen, batch) -> (state, metrics)."""
    return self._jitted(self._take_step).lower(self.state, self.frozen, self.batch).compile()

  @property
  def _take_step(self) -> step.Step:
    return step.make_step(self.stage.loss, self.run.optimizer, self.run.training)

  def _jitted(self, take_step: Callable[..., Any]) -> jax.stages.Wrapped:
    shardings = jax.tree.map(lambda x: x.sharding, self.state)
    return jax.jit(take_step, out_shardings=(shardings, self._replicated), donate_argnums=0)
