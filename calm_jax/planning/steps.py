"""Settings and a topology -> plans of a run's programs on that topology.

The programs are the real ones, compiled for a mesh of devices that are not attached: the
train step, the scoring of a batch of held-out examples, and the two programs that generate
text on one device. No data, workdir or arrays are needed.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from calm_jax import config, errors
from calm_jax.generation import batching, candidates, requests
from calm_jax.kernels import attention
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.parallel import rules
from calm_jax.planning import published, result
from calm_jax.planning.compiled import matmuls, runs, topologies
from calm_jax.planning.compiled import program as program_lib
from calm_jax.running import counting, untrained
from calm_jax.running import texts as texts_lib
from calm_jax.stages import spec as spec_lib
from calm_jax.stages import table
from calm_jax.training import evaluation, optimizer, program

Tree = Any


def _bytes(tree: Tree) -> int:
  """Returns the bytes of one device's shards."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


@dataclasses.dataclass(frozen=True)
class PlanJob:
  """A run on a topology.

  Attributes:
    name: name of the config, for tables and messages.
    run: settings of the run.
    topology: chips that it is planned for.
    vocab_size: tokens of the vocabulary.
    parents: settings of its parents' runs; by default the published ones.
  """

  name: str
  run: Any
  topology: topologies.Topology
  vocab_size: int = published.VOCAB
  parents: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    config.require(self.vocab_size > 1, f"vocab_size must be above 1, got {self.vocab_size}")
    _ = self.mesh
    evaluation.require_context(self.run.data.context, self.patch_size, "config.data.context")
    optimizer.schedule(self.run.optimizer, self.run.training.steps)
    transformer = self._spec.transformer(self.run)
    program.require_divisible(self.run, self.positions, transformer, self.mesh)

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    return mesh_lib.build(self.run.mesh, topologies.devices(self.topology))

  @property
  def _spec(self) -> spec_lib.Spec:
    return table.of(self.run)

  @property
  def parent_runs(self) -> dict[str, Any]:
    """Settings of all parents."""
    return untrained.parent_runs(self.run, self.parents)

  @property
  def patch_size(self) -> int:
    return self._spec.patch_size(self.run)

  @property
  def transformer(self) -> config.Transformer | None:
    """Sizes of the Transformer over positions, if the stage has one."""
    return self._spec.transformer(self.run)

  @property
  def positions(self) -> int:
    """P, the positions of an example."""
    return self.run.data.context // self.patch_size

  def changed(self, **settings: Any) -> "PlanJob":
    """Returns the job with sections of its settings replaced, such as `execution=...`."""
    return dataclasses.replace(self, run=dataclasses.replace(self.run, **settings))

  def program(self) -> program.TrainProgram:
    """Returns the run's train program; its mesh must be the one that is set."""
    functions = untrained.functions(self.run, self.parent_runs, self.vocab_size, untrained.abstract)
    return program.TrainProgram(self.run, functions, self.mesh, self._spec.fields(self.run))


def train_plan(job: PlanJob) -> result.Plan:
  """Returns the plan of the train step.

  Raises:
    CalmError: if the settings don't fit each other or the topology.
  """
  run = job.run
  with jax.set_mesh(job.mesh):
    train_program = job.program()
    state = train_program.state
    rules.require_sharded(state.params, job.mesh)
    kind = attention.choose(run.execution.attention, job.positions, run.training.compute_dtype)
    lowered = train_program.lowered_step()
  compiled = program_lib.compile_lowered(lowered)
  tokens = run.training.batch * run.data.context
  rows = run.training.batch // run.training.accumulation // mesh_lib.row_parts(job.mesh)
  kernel_flops = _kernel_flops(job, compiled.module, rows) * job.mesh.size
  facts = result.Facts(
    name=job.name,
    parameters=sum(x.size for x in jax.tree.leaves(state.params)),
    state_bytes=_bytes(state),
    state_arrays=len(jax.tree.leaves(state)),
    tokens=tokens,
    model_flops=counting.train_per_token(run, job.parent_runs, job.vocab_size) * tokens,
    steps=run.training.steps,
    kernel_flops=kernel_flops,
    padding_flops=kernel_flops * (_padding(job) - 1) if kernel_flops else 0.0,
    fsdp=job.mesh.shape["fsdp"] * job.mesh.shape["sequence"],
    examples=rows,
    accumulation=run.training.accumulation,
    recomputes_all=run.execution.remat == "full",
    choices={
      "attention": kind,
      "remat": run.execution.remat,
      "accumulation": run.training.accumulation,
      **{f"mesh.{name}": size for name, size in job.mesh.shape.items()},
    },
  )
  return result.Plan.of(facts, job.topology, list(job.mesh.devices.flat), compiled)


def _kernel_flops(job: PlanJob, module: runs.Module, rows: int) -> float:
  """Returns the FLOPs of attention's kernels on one device."""
  if job.transformer is None:
    return 0.0
  parts = job.mesh.shape["sequence"] * job.mesh.shape["tensor"]
  product = attention.product_flops(rows, job.positions, job.transformer.width) / parts
  return sum(
    count * attention.products(name) * product for name, count in matmuls.kernels(module).items()
  )


def _padding(job: PlanJob) -> float:
  """Returns the padding factor: FLOPs of attention's kernels over those counted."""
  sizes = job.transformer
  assert sizes is not None
  return attention.padding(job.positions, sizes.width // sizes.heads, job.mesh.shape)


def evaluation_plan(job: PlanJob) -> result.Plan:
  """Returns the plan of scoring one batch of held-out examples.

  The batch holds as many examples as an evaluation in training scores in total, but at most a
  training batch, rounded up to a multiple that the mesh divides evenly.
  """
  run = job.run
  with jax.set_mesh(job.mesh):
    train_program = job.program()
    params = train_program.state.params
    blocks = run.training.eval_blocks
    batch, seed = min(run.training.batch, blocks), run.training.seed
    evaluator = evaluation.Evaluator(
      train_program.stage, None, run.data.context, batch, blocks, seed
    )
    lowered = evaluator.lowered(params, train_program.frozen)
  compiled = program_lib.compile_lowered(lowered)
  facts = _forward_facts(f"{job.name}, evaluation", params, evaluator.rows * run.data.context)
  return result.Plan.of(facts, job.topology, list(job.mesh.devices.flat), compiled)


def _forward_facts(name: str, params: Tree, tokens: int) -> result.Facts:
  """Returns the facts of a program without a backward pass."""
  leaves = jax.tree.leaves(params)
  return result.Facts(
    name=name,
    parameters=sum(x.size for x in leaves),
    state_bytes=_bytes(params),
    state_arrays=0,
    tokens=tokens,
    model_flops=0.0,
    steps=1,
    recomputes_all=True,
  )


def decode_plans(job: PlanJob, texts: int = 1, draws: int = 1) -> dict[str, result.Plan]:
  """Returns the plans of the two programs that generate text on one device, by name.

  "prompt" reads prompts that fill the window. "patch" is the generation loop, counted for one
  patch with one round of each size, since the number of rounds depends on the draws.

  Args:
    texts: number of texts generated at once.
    draws: N, the maximum number of draws per patch; above 1 implies T < 1.

  Raises:
    CalmError: if the stage generates no text.
  """
  how = table.of(job.run).writing
  if how is None:
    raise errors.CalmError(f"stage {job.run.stage!r} generates no text: leave out --decode")
  mesh = mesh_lib.build(config.Mesh(fsdp=1), list(job.mesh.devices.flat)[:1])
  single = dataclasses.replace(job.topology, shape=(1,) * len(job.topology.shape), slices=1)
  replicated = NamedSharding(mesh, PartitionSpec())

  def with_sharding(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), tree)

  plans = {}
  with jax.set_mesh(mesh):
    trained = untrained.trained(job.run, job.parent_runs, job.vocab_size, untrained.abstract)
    decoder = texts_lib.decoder(trained, requests.Sampler(how.rule), lambda line: None)
    window, size = decoder.window, job.patch_size
    slots = batching.ring(window)
    params = with_sharding(decoder.law.params)
    batch, tails = [requests.Request(num_candidates=draws)] * texts, [()] * texts
    power = [2.0 if draws > 1 else 1.0] * texts
    arrays = with_sharding(
      jax.eval_shape(lambda: batching.request_arrays(batch, power, [1.0] * texts, tails, size))
    )
    token_BPK = with_sharding(jax.ShapeDtypeStruct((texts, window, size), jnp.int32))
    sizes = tuple(candidates.round_sizes(texts, math.ceil(power[0]), draws))
    prompt = (params, token_BPK, arrays.first.limit_B, arrays.max_tokens_B, arrays.first.key_B)
    state = with_sharding(jax.eval_shape(functools.partial(decoder.prefill, slots=slots), *prompt))
    lowered = {
      "prompt": (decoder.prefill.lower(*prompt, slots=slots), window),
      "patch": (decoder.steps.lower(params, arrays, state, slots=draws, sizes=sizes, count=1), 1),
    }
  for name, (lowered_program, patches) in lowered.items():
    compiled = program_lib.compile_lowered(lowered_program)
    facts = _forward_facts(f"{job.name}, decode: {name}", params, texts * patches * size)
    plans[name] = result.Plan.of(facts, single, list(mesh.devices.flat), compiled)
  return plans


@dataclasses.dataclass(frozen=True)
class Check:
  """FLOPs of a step on all chips.

  Attributes:
    unrolled: FLOPs of the program with unrolled layers.
    scanned: FLOPs of the program that scans layers, with all iterations.
    analytic: FLOPs that the program should have.
  """

  unrolled: float
  scanned: float
  analytic: float

  @property
  def ratios(self) -> Mapping[str, float]:
    """FLOPs of both programs, relative to the analytic count."""
    return {
      "unrolled": self.unrolled / self.analytic,
      "scanned": self.scanned / self.analytic,
    }


def check_flops(job: PlanJob) -> Check:
  """Returns the FLOPs of the program, without recomputation, and the analytic count."""
  counts = {}
  for unroll in (True, False):
    execution = dataclasses.replace(job.run.execution, remat="none", unroll=unroll)
    plan = train_plan(job.changed(execution=execution))
    counts[unroll] = plan.program_flops * job.topology.devices
  tokens = job.run.training.batch * job.run.data.context
  analytic = counting.program_per_token(job.run, job.parent_runs, job.vocab_size) * tokens
  return Check(counts[True], counts[False], analytic)
