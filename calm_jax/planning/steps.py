"""Settings and a topology -> the programs that a run there would take, and what they cost.

The real ones, over the mesh of devices that are not there: the train step, the
scoring of a batch of held-out examples, and on one device the two programs that a
text is written by. No data and no workdir is needed, and no array is made.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from calm_jax import config, workdir
from calm_jax.generation import candidates, decode, laws, requests
from calm_jax.models import attention, autoencoder, calm, flops, transformer
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.parallel import rules
from calm_jax.planning import matmuls, published, result, runs, topologies
from calm_jax.planning import program as program_lib
from calm_jax.training import evaluation, optimizer, program, stages, untrained

Tree = Any


def _abstract(init: Callable[[jax.Array], Tree]) -> Tree:
  return jax.eval_shape(lambda: init(jax.random.key(0)))


def _bytes(tree: Tree) -> int:
  """Of what one device holds."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


@dataclasses.dataclass(frozen=True)
class Job:
  """A run that is to be on a topology.

  Attributes:
    name: of its config, for people.
    codec: sizes of stage two's autoencoder; other stages read none.
    evaluated: examples scored at once.
  """

  name: str
  run: config.Run
  topology: topologies.Topology
  vocab_size: int = published.VOCAB
  codec: config.Autoencoder = dataclasses.field(default_factory=config.Autoencoder)

  def __post_init__(self):
    config.require(self.vocab_size > 1, f"the vocabulary must be above 1, got {self.vocab_size}")
    _ = self.mesh
    evaluation.require_context(self.run.data.context, self.patch_size, "config.data.context")
    optimizer.schedule(self.run.optimizer, self.run.training.steps)
    program.require_divisible(self.run, self.positions, self.mesh)

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    return mesh_lib.build(self.run.mesh, topologies.devices(self.topology))

  @property
  def sizes(self) -> config.Autoencoder | None:
    """Of the autoencoder that is trained or read."""
    if isinstance(self.run, config.AutoencoderRun):
      return self.run.model
    return self.codec if self.run.stage == "calm" else None

  @property
  def patch_size(self) -> int:
    return self.sizes.patch_size if self.sizes else 1

  @property
  def positions(self) -> int:
    """P, of an example."""
    return self.run.data.context // self.patch_size

  def changed(self, **settings: Any) -> "Job":
    """Returns the job with other parts of its settings, as `execution=...`."""
    return dataclasses.replace(self, run=dataclasses.replace(self.run, **settings))

  def _stage(self) -> stages.Stage:
    return untrained.stage(self.run, self.codec, self.vocab_size, _abstract)

  def _codec(self) -> autoencoder.Autoencoder:
    dtype = jnp.dtype(self.run.training.compute_dtype)
    return autoencoder.Autoencoder(self.codec, self.vocab_size, dtype)

  def program(self) -> program.Program:
    """Returns the run's functions on the mesh, which must be set."""
    return program.Program(self.run, self._stage(), self.mesh)


def train_plan(job: Job) -> result.Plan:
  """Returns the plan of the train step.

  Raises:
    CalmError: for settings that don't fit each other or the topology.
  """
  run = job.run
  with jax.set_mesh(job.mesh):
    stage_program = job.program()
    state = stage_program.state
    rules.require_sharded(state.params, job.mesh)
    kind = attention.choose(run.execution.attention, job.positions, run.training.compute_dtype)
    lowered = stage_program.lowered_step()
  made = program_lib.compile_lowered(lowered)
  tokens = run.training.batch * run.data.context
  codec = job.sizes
  rows = run.training.batch // run.training.accumulation // mesh_lib.row_parts(job.mesh)
  kernel_flops = _kernel_flops(job, made.module, rows) * job.mesh.size
  facts = result.Facts(
    name=job.name,
    parameters=sum(x.size for x in jax.tree.leaves(state.params)),
    state_bytes=_bytes(state),
    state_arrays=len(jax.tree.leaves(state)),
    tokens=tokens,
    model_flops=flops.train_per_token(run, codec, job.vocab_size) * tokens,
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
  return result.Plan.of(facts, job.topology, list(job.mesh.devices.flat), made)


def _kernel_flops(job: Job, module: runs.Module, rows: int) -> float:
  """Returns the FLOPs of one device in attention's kernels."""
  if isinstance(job.run, config.AutoencoderRun):
    return 0.0
  parts = job.mesh.shape["sequence"] * job.mesh.shape["tensor"]
  product = attention.product_flops(rows, job.positions, job.run.model.width) / parts
  return sum(
    count * attention.products(name) * product for name, count in matmuls.kernels(module).items()
  )


def _padding(job: Job) -> float:
  """Returns by which factor attention's kernels compute more than they are counted with."""
  assert not isinstance(job.run, config.AutoencoderRun)
  sizes = job.run.model
  return attention.padding(job.positions, sizes.width // sizes.heads, job.mesh.shape)


def evaluation_plan(job: Job) -> result.Plan:
  """Returns the plan of scoring one batch of held-out examples, as training does.

  It takes as many examples at once as training scores in all, or as fit the mesh evenly.
  """
  run = job.run
  with jax.set_mesh(job.mesh):
    stage_program = job.program()
    params = stage_program.state.params
    blocks = run.training.eval_blocks
    evaluator = evaluation.Evaluator(
      stage_program.stage, None, run.data.context, min(run.training.batch, blocks), blocks,
      run.training.seed,
    )  # fmt: skip
    lowered = evaluator.lowered(params, stage_program.frozen)
  made = program_lib.compile_lowered(lowered)
  facts = _forward_facts(f"{job.name}, evaluation", params, evaluator.rows * run.data.context)
  return result.Plan.of(facts, job.topology, list(job.mesh.devices.flat), made)


def _forward_facts(name: str, params: Tree, tokens: int) -> result.Facts:
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


def decode_plans(job: Job, texts: int = 1, draws: int = 1) -> dict[str, result.Plan]:
  """Returns the plans of the two programs that write texts, on one device.

  They are the reading of prompts that fill the window, and the loop that writes, counted
  for one patch and one of each kind of round: how many rounds come the program can't tell.

  Args:
    draws: N, candidates a patch at most. Below temperature 1 it is above 1.

  Raises:
    CalmError: for a stage that writes no text.
  """
  config.require(
    job.run.stage in laws.LAWS, f"stage {job.run.stage!r} writes no text: leave out --decode"
  )
  mesh = mesh_lib.build(config.Mesh(fsdp=1), list(job.mesh.devices.flat)[:1])
  one = dataclasses.replace(job.topology, shape=(1,) * len(job.topology.shape), slices=1)
  everywhere = NamedSharding(mesh, PartitionSpec())

  def placed(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)

  found = {}
  with jax.set_mesh(mesh):
    decoder = _decoder(job)
    window, size = decoder.window, job.patch_size
    slots = decode.ring(window)
    params = placed(decoder.law.params)
    wishes, none = [requests.Request(num_candidates=draws)] * texts, [()] * texts
    power = [2.0 if draws > 1 else 1.0] * texts
    asked = placed(jax.eval_shape(lambda: decode.asked(wishes, power, none, size)))
    token_BPK = placed(jax.ShapeDtypeStruct((texts, window, size), jnp.int32))
    sizes = tuple(candidates.round_sizes(texts, math.ceil(power[0]), draws))
    prompt = (params, token_BPK, asked.first.limit_B, asked.max_tokens_B, asked.first.key_B)
    state = placed(jax.eval_shape(functools.partial(decoder.prefill, slots=slots), *prompt))
    lowered = {
      "prompt": (decoder.prefill.lower(*prompt, slots=slots), window),
      "patch": (decoder.steps.lower(params, asked, state, slots=draws, sizes=sizes, count=1), 1),
    }
  for name, (one_lowered, patches) in lowered.items():
    made = program_lib.compile_lowered(one_lowered)
    facts = _forward_facts(f"{job.name}, decode: {name}", params, texts * patches * size)
    found[name] = result.Plan.of(facts, one, list(mesh.devices.flat), made)
  return found


def _decoder(job: Job) -> decode.Decoder:
  """Returns what texts are written by, with abstract parameters."""
  run: Any = job.run
  origin = workdir.Origin("", "", "", job.vocab_size, eos_id=0, appends_eos=True, start_patch=())
  if isinstance(run, config.TransformerRun):
    dtype = jnp.dtype(run.training.compute_dtype)
    model = transformer.Transformer(run.model, job.vocab_size, dtype)
    trained = workdir.TrainedTransformer(run, origin, _abstract(model.initial), 0, model)
  else:
    codec = job._codec()
    model = calm.Calm.build(run, codec, job.vocab_size)
    stage_one = workdir.TrainedAutoencoder(
      config.AutoencoderRun(model=job.codec), origin, _abstract(codec.initial), 0
    )
    trained = workdir.TrainedCalm(run, origin, _abstract(model.init), 0, stage_one, model)
  return decode.Decoder(trained, requests.Sampler(), lambda line: None)


@dataclasses.dataclass(frozen=True)
class Check:
  """FLOPs of a step on all chips.

  Attributes:
    unrolled, scanned: of the program whose layers stand one after the other, and of
      the one that loops over them, multiplied out.
    analytic: of what the program should compute.
  """

  unrolled: float
  scanned: float
  analytic: float

  @property
  def ratios(self) -> Mapping[str, float]:
    return {
      "unrolled": self.unrolled / self.analytic,
      "scanned": self.scanned / self.analytic,
    }


def check_flops(job: Job) -> Check:
  """Returns the FLOPs of the program beside those of the analytic count, nothing recomputed."""
  found = {}
  for unroll in (True, False):
    execution = dataclasses.replace(job.run.execution, remat="none", unroll=unroll)
    plan = train_plan(job.changed(execution=execution))
    found[unroll] = plan.program_flops * job.topology.devices
  tokens = job.run.training.batch * job.run.data.context
  analytic = flops.computed_per_token(job.run, job.sizes, job.vocab_size) * tokens
  return Check(found[True], found[False], analytic)
