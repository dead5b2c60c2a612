"""The real training step of any stage, on random tokens, as a contender."""

import functools
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp

from benchmarks import jobs, timing
from calm_jax import config, errors
from calm_jax.data import pipeline, synthetic
from calm_jax.kernels import attention
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.reporting import provenance
from calm_jax.running import untrained
from calm_jax.stages import table
from calm_jax.training import checkpoint, feed, program, step
from calm_jax.training import stage as stage_lib

MATMUL = 2048  # Rows and columns of the product whose FLOP/s count as a CPU's peak.


def stage_of(job: jobs.BenchmarkJob) -> stage_lib.Stage:
  """Returns the stage; stage two reads an autoencoder of initial values."""
  return untrained.functions(
    job.run, job.parents, job.vocab_size, lambda initial: jax.jit(initial)(jax.random.key(1))
  )


def matmul_rate() -> float:
  """Returns FLOP/s of a square float32 product."""
  x = jnp.ones((MATMUL, MATMUL))
  product = jax.jit(jnp.matmul)
  return 2 * MATMUL**3 / timing.median_seconds(lambda: product(x, x), 5)


class Steps:
  """Steps as `training.trainer` takes them, data included, without reports and saves."""

  def __init__(self, job: jobs.BenchmarkJob):
    run = job.run
    jax.set_mesh(mesh_lib.build(run.mesh))
    self._stage = stage_of(job)
    spec = table.of(run)
    if spec.source:
      raise errors.CalmError(
        f"stage {run.stage!r} makes its own batches: --suite=train times stages on random tokens"
      )
    fields = spec.fields(run)
    self._program = program.TrainProgram(run, self._stage, mesh_lib.current(), fields)
    patch, transformer = spec.patch_size(run), spec.transformer(run)
    config.require(
      run.data.context % patch == 0,
      f"config.data.context must be a multiple of K = {patch}, got {run.data.context}",
    )
    program.require_divisible(run, run.data.context // patch, transformer, self._program.mesh)
    self._attention = "none"
    if transformer:
      positions, dtype = run.data.context // patch, run.training.compute_dtype
      self._attention = attention.choose(run.execution.attention, positions, dtype)
    self._state = self._program.initial()
    start = time.perf_counter()
    self._step = self._program.compiled_plain_step()
    self._compile_seconds = time.perf_counter() - start
    self._save_seconds = self._saved()
    self._matmul_flops = matmul_rate() if jax.default_backend() == "cpu" else None
    rows = mesh_lib.own_rows(self._program.mesh, run.training.batch)
    store = synthetic.open_store(f"{synthetic.PREFIX}{job.vocab_size}")
    batches = pipeline.TrainingBatches(
      store, run.data.context, run.training.batch, run.training.seed, rows
    )
    self._feed = feed.Feed(batches, self._program.mesh, run.training.batch, rows)
    self._waited, self._count, self._loss = 0.0, 0, float("nan")

  def dispatch(self) -> Callable[[], None] | None:
    start = time.perf_counter()
    fed = self._feed.take(lambda: True)
    assert fed is not None
    self._count += 1
    if self._count > jobs.WARM_UP:
      self._waited += time.perf_counter() - start
    self._state, figures = self._step(self._state, self._stage.frozen, fed.arrays)
    if jax.default_backend() != "cpu":
      return functools.partial(self._wait, figures)
    self._wait(figures)
    return None

  def _wait(self, figures: step.Metrics) -> None:
    self._loss = float(figures["loss"])

  def _saved(self) -> float:
    """Returns the seconds that saving the state takes."""
    with tempfile.TemporaryDirectory(prefix="calm_jax_benchmark_") as folder:
      checkpoints = checkpoint.Checkpoints(str(pathlib.Path(folder) / "workdir"), 1, 0)
      params, rest = step.parts(self._state)
      start = time.perf_counter()
      checkpoints.save(1, params, rest, {})
      checkpoints.wait()
      seconds = time.perf_counter() - start
      checkpoints.close()
    return seconds

  def facts(self) -> dict[str, Any]:
    device = jax.devices()[0]
    memory = self._program.mesh.devices.flat[0].memory_stats() or {}
    analysis = self._step.memory_analysis()
    return {
      "platform": device.platform,
      "device": device.device_kind,
      "devices": self._program.mesh.size,
      "versions": provenance.versions(),
      "attention": self._attention,
      "compile_seconds": self._compile_seconds,
      "save_seconds": self._save_seconds,
      "matmul_flops": self._matmul_flops,
      "waited_seconds": self._waited,
      "loss": self._loss,
      "peak_bytes": memory.get("peak_bytes_in_use"),
      "temporary_bytes": analysis.temp_size_in_bytes if analysis else None,
    }
