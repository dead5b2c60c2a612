"""Trains a run in a workdir, new or resumed; one job at a time."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from calm_jax import config, distributed, figures, files, lease, workdir
from calm_jax.data import pipeline
from calm_jax.kernels import attention
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.parallel import rules
from calm_jax.running import counting, starting
from calm_jax.stages import table
from calm_jax.training import evaluation, metrics, program, trainer
from calm_jax.training import guard as guard_lib

# Subfolder of the workdir for JAX's compilation cache.
COMPILED = "compiled"


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of a run that are not settings.

  Attributes:
    allow_config_change, dry_run, print_shardings: main's flags of the same names.
    keep_compiled: whether JAX's compilation cache is in the workdir, unless JAX is configured with
      another place. The cache is the whole process's from then on.
  """

  allow_config_change: bool = False
  dry_run: bool = False
  print_shardings: bool = False
  keep_compiled: bool = False


def train_run(
  run: Any,
  directory: str,
  options: Options = Options(),
  guard: guard_lib.Guard | None = None,
) -> None:
  """Trains `run` in a workdir, which is created, or resumed if it exists.

  Raises:
    CalmError: if settings, data, devices and workdir don't fit each other, or another job
      trains there; nothing is written in these cases.
    Interrupted: after Ctrl-C or SIGTERM, once the state is saved.
  """
  guard_context = contextlib.nullcontext(guard) if guard else guard_lib.Guard(run.limits)
  lease_context = contextlib.nullcontext() if options.dry_run else _leased(directory)
  mesh = mesh_lib.build(run.mesh)
  with guard_context as guard, jax.set_mesh(mesh), lease_context as workdir_lease:
    _train_on_mesh(run, directory, options, guard, workdir_lease)


@contextlib.contextmanager
def _leased(directory: str) -> Iterator[lease.Lease]:
  """Keeps other jobs out of a workdir; process 0 holds the lease for all processes of this job."""
  workdir_lease = lease.Lease(lease.of_folder(directory), f"--workdir={directory}")

  def attempt() -> float:
    files.require_reachable(directory)
    return workdir_lease.attempt()

  try:
    # Short waits between exchanges, so that the processes keep hearing from each other.
    while wait := distributed.first_number("lease", attempt):
      time.sleep(wait)
    with distributed.before_exit(workdir_lease.release):
      yield workdir_lease
  finally:
    workdir_lease.release()


def _train_on_mesh(
  run: Any,
  directory: str,
  options: Options,
  guard: guard_lib.Guard,
  workdir_lease: lease.Lease | None,
) -> None:
  """Trains on the mesh that is set; without a lease, only checks and compiles."""
  start = starting.prepare(run, directory, options.allow_config_change)
  source = _source(start)
  train_program = program.TrainProgram(
    run, start.functions, mesh_lib.current(), table.of(run).fields(run)
  )
  _describe(start, train_program, options.print_shardings)
  for line in starting.remarks(run, start.store):
    metrics.show(line)
  guard.ledger.part("read input")
  if workdir_lease is None:
    metrics.show(program.memory_line(train_program.compiled_step()))
    metrics.show(f"dry run: nothing was written; {run.training.steps} steps would be trained")
    return
  training = _training(start, train_program, source)
  start = dataclasses.replace(start, initial=None)  # The trainer alone keeps them in memory.
  _write_workdir(start, directory)
  distributed.together("workdir seen", lambda: _require_shared(directory))
  if options.keep_compiled and jax.config.values["jax_compilation_cache_dir"] is None:
    jax.config.update("jax_compilation_cache_dir", f"{directory}/{COMPILED}")
    compilation_cache.reset_cache()  # JAX looks for the folder only once.
  trainer.Trainer(training, directory, guard, workdir_lease).train()


def _source(start: starting.Start) -> pipeline.Source:
  """Returns this process's rows of the training batches."""
  run, spec = start.run, table.of(start.run)
  rows = mesh_lib.own_rows(mesh_lib.current(), run.training.batch)
  if spec.source:
    return spec.source(run, start.store, start.parents, rows)
  settings = run.training
  return pipeline.TrainingBatches(
    start.store, run.data.context, settings.batch, settings.seed, rows
  )


def _training(
  start: starting.Start, train_program: program.TrainProgram, source: pipeline.Source
) -> trainer.Training:
  """Returns the trainer's inputs."""
  run, spec = start.run, table.of(start.run)
  blocks = run.training.eval_blocks
  return trainer.Training(
    program=train_program,
    source=source,
    evaluate=evaluation.Evaluator(
      start.functions,
      start.store,
      run.data.context,
      min(trainer.EVALUATION_BATCH, blocks),
      blocks,
      seed=0,
    ),
    initial=start.initial,
    record={"config": dataclasses.asdict(run), "origin": start.origin.values()},
    flops_per_token=counting.train_per_token(run, start.parent_runs, start.origin.vocab_size),
    metrics=figures.on_console(spec.presentation.metrics(run)),
    figures=figures.on_console(spec.presentation.figures),
  )


def _describe(
  start: starting.Start, train_program: program.TrainProgram, print_shardings: bool
) -> None:
  """Prints mesh, kernels and parameter count; CalmError if the parameters are not sharded."""
  run, mesh, params = start.run, train_program.mesh, train_program.state.params
  replicated = rules.require_sharded(params, mesh)
  count = sum(x.size for x in jax.tree.leaves(params))
  axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
  kernel = "none"
  if table.of(run).transformer(run):
    kernel = attention.choose(run.execution.attention, start.positions, run.training.compute_dtype)
  metrics.show(
    f"mesh {axes}, {mesh.size} of {jax.device_count()} devices; attention {kernel}, remat "
    f"{run.execution.remat}; {count:,} parameters, {replicated:.2%} of their bytes replicated"
  )
  if print_shardings:
    metrics.show(rules.table(rules.placed(params, mesh)))


def _write_workdir(start: starting.Start, directory: str) -> None:
  """Creates a new workdir, or updates the settings of an existing one."""
  run = start.run
  if workdir.exists(directory):
    distributed.on_first("workdir", lambda: workdir.change_config(directory, run))
    return
  start.copy_parents(directory)
  new_seal = workdir.sealed(directory, run, start.origin, start.tokenizer)
  distributed.on_first(
    "workdir", lambda: workdir.create(directory, run, start.origin, start.tokenizer, new_seal)
  )


def _require_shared(directory: str) -> None:
  config.require(
    workdir.exists(directory),
    f"--workdir={directory} was written by process 0, but is not visible to this process: give a "
    "folder that all machines share, or a bucket",
  )
