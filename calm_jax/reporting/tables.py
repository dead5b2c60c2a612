"""An account -> rows of its tables: settings, totals, evaluation figures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm_jax import config, resolve
from calm_jax import figures as figures_lib
from calm_jax.reporting import records
from calm_jax.training import ledger

_COMMON_SETTINGS = (
  "data.context",
  "training.batch",
  "training.accumulation",
  "training.compute_dtype",
  "training.seed",
  "optimizer.learning_rate",
  "optimizer.schedule",
  "optimizer.warmup_steps",
  "optimizer.weight_decay",
  "optimizer.clip_norm",
)


def settings(run: config.Run, names: Sequence[str]) -> list[tuple[str, str]]:
  """Returns names and values of a run's settings: those in `names`, then those of all stages."""
  rows = []
  for name in (*names, *_COMMON_SETTINGS):
    value = resolve.at(run, name)
    rows.append((name, f"{value:g}" if isinstance(value, float) else str(value)))
  return rows


def totals(account: records.Account) -> list[tuple[str, str]]:
  """Returns names and values of the run's totals: steps, tokens, time, FLOPs, speed."""
  run, step = account.run, account.step
  seconds = float(np.nansum(records.column(account.train, "seconds")))
  rows = [
    ("Stage", run.stage),
    ("Steps", f"{step:,} of {run.training.steps:,}"),
    ("Tokens seen", _short(step * run.data.context * run.training.batch)),
    ("Time training", _duration(seconds)),
  ]
  flops = records.column(account.train[-1:], "flops")[0]
  if math.isfinite(flops):
    rows.append(("Training FLOPs", f"{flops:.3g}"))
  speed = records.tokens_per_second(account)
  if math.isfinite(speed):
    rows.append(("Median speed", f"{speed:,.0f} tokens/s"))
  if account.patch_size:
    rows.append(("Patch size K", f"{account.patch_size} tokens"))
  return rows


def goodput(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns names and values of `training.ledger.goodput`, with each kind's share of the time."""
  rows = [
    ("Goodput", f"{figures['goodput']:.1%}"),
    ("From the first start", _duration(figures["total"])),
    ("Attempts", str(figures["attempts"])),
  ]
  kinds = (
    ("productive", "Steps that count"),
    ("lost", "Repeated steps"),
    ("down", "Between attempts"),
  )
  for name, label in (
    *kinds,
    *((kind, kind.replace("_", " ").capitalize()) for kind in ledger.KINDS),
  ):
    seconds = figures[name]
    rows.append((label, f"{_duration(seconds)} ({seconds / figures['total']:.1%})"))
  return rows


def _short(count: int) -> str:
  for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
    if count >= size:
      return f"{count / size:.4g} {letter}"
  return f"{count:,}"


def _duration(seconds: float) -> str:
  if seconds >= 7200:
    return f"{seconds / 3600:,.1f} h"
  return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"


def evaluation(
  scores: Sequence[figures_lib.Figure], figures: Mapping[str, Any]
) -> list[tuple[str, str, str, str]]:
  """Returns label, value ± standard error, unit and direction of each figure that exists."""
  return [
    (figure.label, _with_stderr(figure, figures), figure.unit, figure.direction)
    for figure in scores
    if isinstance(figures.get(figure.name), (int, float))
  ]


def _with_stderr(score: figures_lib.Figure, figures: Mapping[str, Any]) -> str:
  value, stderr = figures[score.name], figures.get(f"{score.name}_stderr")
  if isinstance(value, int):
    return f"{value:,}"
  if not isinstance(stderr, (int, float)) or not math.isfinite(stderr):
    return f"{score.scale * value:.4g}"
  stderr *= score.scale
  digits = 3 if stderr <= 0 else min(8, max(0, 1 - math.floor(math.log10(stderr))))
  return f"{score.scale * value:.{digits}f} ± {stderr:.{digits}f}"


def conditions(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns names and values of the conditions that the evaluation figures depend on."""
  names: Sequence[tuple[str, str]] = (
    ("step", "step"),
    ("context_tokens", "context in tokens"),
    ("blocks", "held-out blocks"),
    ("tokens", "tokens"),
    ("samples", "samples N"),
    ("seed", "seed"),
    ("data", "data"),
    ("store_hash", "store"),
  )
  rows = []
  for name, label in names:
    if name in figures:
      value = figures[name]
      rows.append((label, f"{value:,}" if isinstance(value, int) else str(value)))
  return rows
