"""Trains a run in a workdir: one job at a time, begun or resumed."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax

from calm_jax import config, distributed, files, lease, workdir
from calm_jax.data import pipeline
from calm_jax.kernels import attention
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.parallel import rules
from calm_jax.running import counting, starting
from calm_jax.stages import table
from calm_jax.training import evaluation, figures, metrics, program, trainer
from calm_jax.training import guard as guard_lib


@dataclasses.dataclass(frozen=True)
class Options:
  """What is asked of a run besides its settings: the flags of the same names."""

  allow_config_change: bool = False
  dry_run: bool = False
  print_shardings: bool = False


def train_run(
  run: Any,
  directory: str,
  options: Options = Options(),
  guard: guard_lib.Guard | None = None,
) -> None:
  """Trains `run` in a workdir, new or to be resumed.

  Raises:
    CalmError: for settings, data, devices or a workdir that don't fit each other, or while
      another process trains there; nothing is written then.
    Interrupted: after Ctrl-C or SIGTERM, once the state is saved.
  """
  guarded = contextlib.nullcontext(guard) if guard else guard_lib.Guard(run.limits)
  leased = contextlib.nullcontext() if options.dry_run else _leased(directory)
  with guarded as guard, jax.set_mesh(mesh_lib.build(run.mesh)), leased as held:
    _train_on_mesh(run, directory, options, guard, held)


@contextlib.contextmanager
def _leased(directory: str) -> Iterator[lease.Lease]:
  """Keeps other jobs out of a workdir; process 0 does it for all processes of this one."""
  held = lease.Lease(lease.of_folder(directory), f"--workdir={directory}")

  def take() -> float:
    files.require_reachable(directory)
    return held.attempt()

  try:
    # In turns, so that no process waits for long without hearing from the others.
    while wait := distributed.first_number("lease", take):
      time.sleep(wait)
    with distributed.before_exit(held.release):
      yield held
  finally:
    held.release()


def _train_on_mesh(
  run: Any,
  directory: str,
  options: Options,
  guard: guard_lib.Guard,
  held: lease.Lease | None,
) -> None:
  start = starting.prepare(run, directory, options.allow_config_change)
  source = _source(start)
  made = program.TrainProgram(run, start.functions, mesh_lib.current(), source.fields)
  _describe(start, made, options.print_shardings)
  for line in starting.remarks(run, start.store):
    metrics.show(line)
  guard.ledger.part("read input")
  if held is None:
    metrics.show(program.memory_line(made.compiled_step()))
    metrics.show(f"dry run: nothing was trained or written; {run.training.steps} steps would be")
    return
  training = _training(start, made, source)
  start = dataclasses.replace(start, initial=None)  # The trainer alone holds it until it begins.
  _begin(start, directory)
  distributed.together("workdir seen", lambda: _require_shared(directory))
  trainer.Trainer(training, directory, guard, held).train()


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
  start: starting.Start, made: program.TrainProgram, source: pipeline.Source
) -> trainer.Training:
  run, spec = start.run, table.of(start.run)
  blocks = run.training.eval_blocks
  return trainer.Training(
    program=made,
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
    record={"config": dataclasses.asdict(run), "origin": dataclasses.asdict(start.origin)},
    flops_per_token=counting.train_per_token(run, start.parent_runs, start.origin.vocab_size),
    metrics=figures.on_console(spec.presentation.metrics),
    figures=figures.on_console(spec.presentation.figures),
  )


def _describe(start: starting.Start, made: program.TrainProgram, print_shardings: bool) -> None:
  """Says on what the run is computed, and refuses parameters that are not divided."""
  run, mesh, params = start.run, made.mesh, made.state.params
  whole = rules.require_sharded(params, mesh)
  count = sum(x.size for x in jax.tree.leaves(params))
  axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
  kernel = "none"
  if table.of(run).transformer(run):
    kernel = attention.choose(run.execution.attention, start.positions, run.training.compute_dtype)
  metrics.show(
    f"mesh {axes}, {mesh.size} of {jax.device_count()} devices; attention {kernel}, remat "
    f"{run.execution.remat}; {count:,} parameters, {whole:.2%} of their bytes whole on each device"
  )
  if print_shardings:
    metrics.show(rules.table(rules.placed(params, mesh)))


def _begin(start: starting.Start, directory: str) -> None:
  """Makes a new workdir, or gives one that has begun the settings that it resumes with."""
  run = start.run
  if workdir.exists(directory):
    distributed.on_first("workdir", lambda: workdir.change_config(directory, run))
    return
  start.copy_parents(directory)
  made = workdir.sealed(directory, run, start.origin, start.tokenizer)
  distributed.on_first(
    "workdir", lambda: workdir.create(directory, run, start.origin, start.tokenizer, made)
  )


def _require_shared(directory: str) -> None:
  config.require(
    workdir.exists(directory),
    f"--workdir={directory}, which process 0 has written, can't be seen from here: give a folder "
    "that all machines share, or a bucket",
  )
