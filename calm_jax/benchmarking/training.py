"""Speed of training steps: ours and PyTorch's, side by side."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from calm_jax import config, errors
from calm_jax.benchmarking import contenders, peaks
from calm_jax.models import flops

# Sizes that two cores can take: what is measured without --config.
_SETTINGS: dict[str, Any] = {
  "data": config.Data(context=512),
  "training": config.Training(batch=8, compute_dtype="float32"),
  "mesh": config.Mesh(fsdp=1),
}
_LLAMA: dict[str, Any] = {
  "layers": 4, "width": 256, "ffn": 688, "heads": 4, "kv_heads": 4, "init": "fan_in",
}  # fmt: skip
CODEC = config.Autoencoder(width=256, ffn=512, latent=64, init="fan_in")
VOCAB = 8192
_CALM = config.CalmRun(model=config.Backbone(**_LLAMA), head=config.Head(blocks=2), **_SETTINGS)
RUNS: dict[str, config.Run] = {
  "autoencoder": config.AutoencoderRun(model=CODEC, **_SETTINGS),
  "calm": _CALM,
  "calm, exact targets": config.CalmRun(
    model=_CALM.model, head=_CALM.head, loss=config.CalmLoss(targets="exact"), **_SETTINGS
  ),
  "transformer": config.TransformerRun(model=config.Transformer(**_LLAMA), **_SETTINGS),
}


def _ours(job: contenders.Job) -> contenders.Steps:
  from calm_jax.benchmarking import ours  # Here: the process of PyTorch needs no JAX.

  return ours.Steps(job)


def _torch(job: contenders.Job) -> contenders.Steps:
  from calm_jax.benchmarking import peers

  return peers.Steps(job, compiled=False)


def _torch_compiled(job: contenders.Job) -> contenders.Steps:
  from calm_jax.benchmarking import peers

  return peers.Steps(job, compiled=True)


CONTENDERS = (
  contenders.Contender("calm_jax", _ours),
  contenders.Contender("PyTorch", _torch, ("torch", "transformers")),
  contenders.Contender("PyTorch compiled", _torch_compiled, ("torch", "transformers")),
)


def _figures(job: contenders.Job, found: dict[str, Any], peak: float | None) -> dict[str, Any]:
  """Returns what was measured with what follows from it."""
  seconds = np.array(found.pop("step_seconds"))
  if not len(seconds):
    return found
  run, median = job.run, float(np.median(seconds))
  tokens = run.training.batch * run.data.context
  patch = 1 if run.stage == "transformer" else job.codec.patch_size
  codec = None if run.stage == "transformer" else job.codec
  per_token = flops.train_per_token(run, codec, job.vocab_size)
  waited = found.pop("waited_seconds", None)
  return found | {
    "steps": len(seconds),
    "step_seconds": median,
    "step_seconds_p5": float(np.percentile(seconds, 5)),
    "step_seconds_p95": float(np.percentile(seconds, 95)),
    "tokens_per_second": tokens / median,
    "patches_per_second": tokens / patch / median,
    "model_flops_per_token": per_token,
    "model_flops_per_second": per_token * tokens / median,
    "peak_flops": peak,
    "mfu": per_token * tokens / median / (peak * found.get("devices", 1)) if peak else None,
    "data_wait_share": None if waited is None else waited / float(seconds.sum()),
  }


def _line(name: str, one: dict[str, Any], base: dict[str, Any]) -> str:
  if "step_seconds" not in one:
    return f"  {name:18} {one['error']}"
  share = "" if one["mfu"] is None else f", MFU {one['mfu']:5.1%}"
  memory = one.get("peak_bytes") or one["host_peak_bytes"]
  line = (
    f"  {name:18} {one['tokens_per_second']:>11,.0f} tokens/s, {1e3 * one['step_seconds']:8.1f} ms "
    f"a step ({1e3 * one['step_seconds_p5']:.1f} to {1e3 * one['step_seconds_p95']:.1f})"
    f"{share}, peak {memory / 2**30:.2f} GiB"
  )
  if one is not base and "step_seconds" in base:
    line += f"; calm_jax is {one['step_seconds'] / base['step_seconds']:.2f} times as fast"
  return line


def _one(
  job: contenders.Job, against: Sequence[contenders.Contender]
) -> tuple[list[str], dict[str, Any]]:
  found = contenders.compete(against, job, lambda line: print(line, file=sys.stderr, flush=True))
  ours = found["calm_jax"]
  if "error" in ours:
    raise errors.CalmError(f"{job.name} can't be measured: {ours['error']}")
  peak = ours.get("matmul_flops") or peaks.of(ours["device"])
  named = {name: _figures(job, one, peak) for name, one in found.items()}
  base, run = named["calm_jax"], job.run
  codec = None if run.stage == "transformer" else job.codec
  parts = flops.train_parts(run, codec, job.vocab_size)
  told = " + ".join(f"{value / 1e6:.2f} {name}" for name, value in parts.items())
  lines = [
    f"{job.name}: {run.training.batch} sequences of {run.data.context} tokens a step, vocabulary "
    f"{job.vocab_size:,}, {run.training.compute_dtype}, attention {base['attention']}, on "
    f"{base['devices']} {base['device']}",
    *(_line(name, one, base) for name, one in named.items()),
    f"  model MFLOP a token: {told} = {base['model_flops_per_token'] / 1e6:.2f}",
    f"  ours besides: compiling {base['compile_seconds']:.1f} s, saving {base['save_seconds']:.1f} "
    f"s, waiting for data {base['data_wait_share']:.2%} of the time",
  ]
  if peak:
    kind = "measured product of 2,048 squared" if ours.get("matmul_flops") else "published"
    lines.append(f"  peak: {peak / 1e12:.3f} TFLOP/s, {kind}")
  figures = {
    "name": job.name,
    "run": dataclasses.asdict(run),
    "autoencoder": dataclasses.asdict(job.codec),
    "vocab_size": job.vocab_size,
    "flops": parts,
    "contenders": named,
  }
  return lines, figures


def measure(
  given: contenders.Job | None, names: Sequence[str] = ()
) -> tuple[list[str], list[dict[str, Any]]]:
  """Returns lines to be read, and the figures: tokens/s and MFU, higher is better.

  Args:
    given: what to train; None for RUNS.
    names: of CONTENDERS, ours first; all by default.

  Raises:
    CalmError: if ours fails, or for an unknown name.
  """
  known = {contender.name: contender for contender in CONTENDERS}
  for name in names:
    config.require(name in known, f"--contenders has {name!r}: {config.nearest(name, known)}")
  wanted = [one for name, one in known.items() if not names or name in names]
  config.require(
    wanted[0] is CONTENDERS[0], f"--contenders must have {CONTENDERS[0].name}, got {names}"
  )
  small = [contenders.Job(name, run, CODEC, VOCAB) for name, run in RUNS.items()]
  lines, figures = [], []
  for job in [given] if given else small:
    told, found = _one(job, wanted)
    lines += told
    figures.append(found)
  return lines, figures
