"""An account -> the rows of its tables: settings, totals, evaluation figures."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm_jax import config
from calm_jax.objectives import brier
from calm_jax.reporting import records
from calm_jax.training import ledger

HIGHER, LOWER = "higher is better", "lower is better"


@dataclasses.dataclass(frozen=True)
class Score:
  """How an evaluation figure is shown; `name`_stderr is its standard error if there is one.

  Attributes:
    scale: what the stored figure is multiplied with to be in `unit`.
    direction: which way is better, or what the figure is compared with.
  """

  name: str
  label: str
  unit: str
  direction: str
  scale: float = 1.0


_ENERGY_UNIT = "latent unit^alpha"

_BRIER = (
  Score("brier_lm", "BrierLM", "%", HIGHER),
  Score("brier_lm_marginal", "BrierLM of the marginal", "%", "reached without any context"),
)
_BRIER_PARTS = tuple(
  score
  for n in range(1, brier.ORDERS + 1)
  for score in (
    Score(f"brier_{n}", f"Brier-{n}", "%", HIGHER),
    Score(f"accuracy_{n}", f"Accuracy, n = {n}", "%", HIGHER),
    Score(f"collision_{n}", f"Collision, n = {n}", "%", "equals accuracy if calibrated"),
  )
)

SCORES: dict[str, tuple[Score, ...]] = {
  "autoencoder": (
    Score("token_accuracy", "Token accuracy", "%", HIGHER, 100),
    Score("patch_accuracy", "Patch accuracy", "%", HIGHER, 100),
    Score("cross_entropy", "Cross-entropy", "nats a token", LOWER),
    Score("posterior_std", "Posterior std, mean", "latent unit", "1 is the prior's"),
    Score("active_dimensions", "Active dimensions", "dimensions", "KL above the floor"),
    Score("latent_dimensions", "Latent dimensions", "dimensions", "Z, the size of the latent"),
  ),
  "calm": (
    *_BRIER,
    Score("conditioning_gap", "Conditioning gap", _ENERGY_UNIT, f"{HIGHER}; 0 ignores the context"),
    Score("energy", "Energy score", _ENERGY_UNIT, LOWER),
    *_BRIER_PARTS,
  ),
  "transformer": (
    *_BRIER,
    Score("cross_entropy", "Cross-entropy", "nats a token", LOWER),
    *_BRIER_PARTS,
  ),
}

_TRANSFORMER = (
  "model.layers", "model.width", "model.ffn", "model.heads", "model.kv_heads",
  "model.rope_theta", "model.init",
)  # fmt: skip
_SETTINGS = {
  "autoencoder": (
    "model.patch_size", "model.width", "model.ffn", "model.encoder_layers",
    "model.decoder_layers", "model.latent", "model.init", "loss.kl_weight", "loss.kl_floor",
    "loss.drop_token", "loss.drop_latent",
  ),
  "calm": (
    *_TRANSFORMER, "model.input", "head.kind", "head.blocks", "head.noise", "head.steps",
    "loss.alpha", "loss.samples", "loss.targets", "loss.posterior_draws",
  ),
  "transformer": _TRANSFORMER,
}  # fmt: skip
_COMMON_SETTINGS = (
  "data.context", "training.batch", "training.accumulation", "training.compute_dtype",
  "training.seed", "optimizer.learning_rate", "optimizer.schedule", "optimizer.warmup_steps",
  "optimizer.weight_decay", "optimizer.clip_norm",
)  # fmt: skip


def settings(run: config.Run) -> list[tuple[str, str]]:
  """Returns names and values of the settings that shape a run."""
  rows = []
  for name in (*_SETTINGS[run.stage], *_COMMON_SETTINGS):
    value: Any = run
    for part in name.split("."):
      value = getattr(value, part)
    rows.append((name, f"{value:g}" if isinstance(value, float) else str(value)))
  return rows


def totals(account: records.Account) -> list[tuple[str, str]]:
  """Returns names and values of what the run took so far."""
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
  """Returns names and values of `training.ledger.goodput`, each kind with its share."""
  rows = [
    ("Goodput", f"{figures['goodput']:.1%}"),
    ("From the first start", _duration(figures["total"])),
    ("Attempts", str(figures["attempts"])),
  ]
  kinds = (
    ("productive", "Steps that count"),
    ("lost", "Steps taken again"),
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


def evaluation(stage: str, figures: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
  """Returns label, value ± standard error, unit and direction of each figure that is there."""
  return [
    (score.label, _with_stderr(score, figures), score.unit, score.direction)
    for score in SCORES[stage]
    if isinstance(figures.get(score.name), (int, float))
  ]


def _with_stderr(score: Score, figures: Mapping[str, Any]) -> str:
  value, stderr = figures[score.name], figures.get(f"{score.name}_stderr")
  if isinstance(value, int):
    return f"{value:,}"
  if not isinstance(stderr, (int, float)) or not math.isfinite(stderr):
    return f"{score.scale * value:.4g}"
  stderr *= score.scale
  digits = 3 if stderr <= 0 else min(8, max(0, 1 - math.floor(math.log10(stderr))))
  return f"{score.scale * value:.{digits}f} ± {stderr:.{digits}f}"


def conditions(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns names and values of what the evaluation figures depend on."""
  names: Sequence[tuple[str, str]] = (
    ("step", "step"), ("context_tokens", "context in tokens"), ("blocks", "held-out blocks"),
    ("tokens", "tokens"), ("samples", "samples N"), ("seed", "seed"),
    ("data", "data"), ("store_hash", "store"),
  )  # fmt: skip
  rows = []
  for name, label in names:
    if name in figures:
      value = figures[name]
      rows.append((label, f"{value:,}" if isinstance(value, int) else str(value)))
  return rows
