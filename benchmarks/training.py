"""Speed of training steps: ours and PyTorch's, in one run."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import contenders, jobs, peaks
from calm_jax import config, errors
from calm_jax.running import counting, untrained
from calm_jax.stages import autoencoder, calm, table, transformer

# What is measured without --config: sizes for two CPU cores.
_SETTINGS: dict[str, Any] = {
  "data": config.Data(context=512),
  "training": config.Training(batch=8, compute_dtype="float32"),
  "mesh": config.Mesh(fsdp=1),
}
_LLAMA: dict[str, Any] = {
  "layers": 4,
  "width": 256,
  "ffn": 688,
  "heads": 4,
  "kv_heads": 4,
  "init": "fan_in",
}
SIZES = config.Autoencoder(width=256, ffn=512, latent=64, init="fan_in")
VOCAB = 8192
_CALM = calm.Run(model=config.Backbone(**_LLAMA), head=config.Head(blocks=2), **_SETTINGS)
RUNS: dict[str, config.Run] = {
  "autoencoder": autoencoder.Run(model=SIZES, **_SETTINGS),
  "calm": _CALM,
  "calm, exact targets": calm.Run(
    model=_CALM.model, head=_CALM.head, loss=config.CalmLoss(targets="exact"), **_SETTINGS
  ),
  "transformer": transformer.Run(model=config.Transformer(**_LLAMA), **_SETTINGS),
}


def _figures(
  job: jobs.BenchmarkJob, measured: dict[str, Any], peak: float | None
) -> dict[str, Any]:
  """Returns a contender's figures: those measured, and speeds and MFU computed from them."""
  seconds = np.array(measured.pop("step_seconds"))
  if not len(seconds):
    return measured
  run, median = job.run, float(np.median(seconds))
  tokens = run.training.batch * run.data.context
  patch = table.of(run).patch_size(run)
  per_token = counting.train_per_token(run, job.parents, job.vocab_size)
  waited = measured.pop("waited_seconds", None)
  return measured | {
    "steps": len(seconds),
    "step_seconds": median,
    "step_seconds_p5": float(np.percentile(seconds, 5)),
    "step_seconds_p95": float(np.percentile(seconds, 95)),
    "tokens_per_second": tokens / median,
    "patches_per_second": tokens / patch / median,
    "model_flops_per_token": per_token,
    "model_flops_per_second": per_token * tokens / median,
    "peak_flops": peak,
    "mfu": per_token * tokens / median / (peak * measured.get("devices", 1)) if peak else None,
    "data_wait_share": None if waited is None else waited / float(seconds.sum()),
  }


def _line(name: str, figures: dict[str, Any], ours: dict[str, Any]) -> str:
  """Returns a contender's line of the table."""
  if "step_seconds" not in figures:
    return f"  {name:18} {figures['error']}"
  share = "" if figures["mfu"] is None else f", MFU {figures['mfu']:5.1%}"
  memory = figures.get("peak_bytes") or figures["host_peak_bytes"]
  median, low, high = (1e3 * figures[f"step_seconds{end}"] for end in ("", "_p5", "_p95"))
  line = (
    f"  {name:18} {figures['tokens_per_second']:>11,.0f} tokens/s, {median:8.1f} ms a step "
    f"({low:.1f} to {high:.1f}){share}, peak {memory / 2**30:.2f} GiB"
  )
  if figures is not ours and "step_seconds" in ours:
    line += f"; calm_jax is {figures['step_seconds'] / ours['step_seconds']:.2f} times as fast"
  return line


def _compare(
  job: jobs.BenchmarkJob, selected: Sequence[contenders.Contender]
) -> tuple[list[str], dict[str, Any]]:
  """Returns the lines and the figures of one job.

  Raises:
    CalmError: if ours fails.
  """
  measured = contenders.compete(
    selected, job, lambda line: print(line, file=sys.stderr, flush=True)
  )
  ours = measured["calm_jax"]
  if "error" in ours:
    raise errors.CalmError(f"{job.name} can't be measured: {ours['error']}")
  peak = ours.get("matmul_flops") or peaks.of(ours["device"])
  figures_of = {name: _figures(job, figures, peak) for name, figures in measured.items()}
  ours, run = figures_of["calm_jax"], job.run
  parts = counting.train_parts(run, job.parents, job.vocab_size)
  summands = " + ".join(f"{value / 1e6:.2f} {name}" for name, value in parts.items())
  lines = [
    f"{job.name}: {run.training.batch} sequences of {run.data.context} tokens a step, vocabulary "
    f"{job.vocab_size:,}, {run.training.compute_dtype}, attention {ours['attention']}, on "
    f"{ours['devices']} {ours['device']}",
    *(_line(name, figures, ours) for name, figures in figures_of.items()),
    f"  model MFLOP a token: {summands} = {ours['model_flops_per_token'] / 1e6:.2f}",
    f"  calm_jax also: compiling {ours['compile_seconds']:.1f} s, saving "
    f"{ours['save_seconds']:.1f} s, waiting for data {ours['data_wait_share']:.2%} of the time",
  ]
  if peak:
    kind = "measured product of 2,048 squared" if ours.get("matmul_flops") else "published"
    lines.append(f"  peak: {peak / 1e12:.3f} TFLOP/s, {kind}")
  figures = {
    "name": job.name,
    "run": dataclasses.asdict(run),
    "parents": {name: dataclasses.asdict(parent) for name, parent in job.parents.items()},
    "vocab_size": job.vocab_size,
    "flops": parts,
    "contenders": figures_of,
  }
  return lines, figures


def measure(
  job: jobs.BenchmarkJob | None, names: Sequence[str] = ()
) -> tuple[list[str], list[dict[str, Any]]]:
  """Returns lines to print, and the figures: tokens/s and MFU, higher is better.

  Args:
    job: what to train; None for RUNS.
    names: names of contenders.CONTENDERS, ours among them; all by default.

  Raises:
    CalmError: if ours fails, or for an unknown name.
  """
  choices = {contender.name: contender for contender in contenders.CONTENDERS}
  for name in names:
    config.require(name in choices, f"--contenders has {name!r}: {config.nearest(name, choices)}")
  selected = [contender for name, contender in choices.items() if not names or name in names]
  ours = contenders.CONTENDERS[0]
  config.require(selected[0] is ours, f"--contenders must have {ours.name}, got {names}")
  stage_one = RUNS["autoencoder"]
  default_jobs = [
    jobs.BenchmarkJob(name, run, untrained.parent_runs(run, {"autoencoder": stage_one}), VOCAB)
    for name, run in RUNS.items()
  ]
  lines, figures = [], []
  for current_job in [job] if job else default_jobs:
    own_lines, own_figures = _compare(current_job, selected)
    lines += own_lines
    figures.append(own_figures)
  return lines, figures
