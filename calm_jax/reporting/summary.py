"""Accounts of both stages -> one mapping of their final figures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from calm_jax import config, errors, files, workdir
from calm_jax.objectives import brier
from calm_jax.reporting import provenance, records

FILE = "summary.json"
STAGES = ("autoencoder", "calm")

_AUTOENCODER_FIGURES = ("token_accuracy", "patch_accuracy")
_CALM_FIGURES = (
  *(f"brier_{n}" for n in range(1, brier.ORDERS + 1)),
  "brier_lm", "brier_lm_stderr", "brier_lm_marginal", "conditioning_gap",
  "conditioning_gap_stderr", "context_tokens",
)  # fmt: skip
_SHOWN_LETTERS = 80


def summarize(
  accounts: Mapping[str, records.Account], seconds_total: float | None
) -> dict[str, Any]:
  """Returns the final figures of one account a stage, None where a figure does not exist.

  Scores of stage two are in percent, the accuracies of the autoencoder are shares.

  Raises:
    CalmError: if one was not evaluated, or `seconds_total` is not finite.
  """
  config.require(
    seconds_total is None or math.isfinite(seconds_total),
    f"--seconds_total must be finite, got {seconds_total}",
  )
  for account in accounts.values():
    if account.evaluation is None:
      raise errors.CalmError(
        f"{account.directory} has no {workdir.EVALUATION}, which the summary needs: run "
        f"{account.evaluate_command}"
      )
  autoencoder, calm = (accounts[stage].evaluation or {} for stage in STAGES)
  speeds = {stage: records.tokens_per_second(accounts[stage]) for stage in STAGES}
  scores = {f"ae_{name}": autoencoder.get(name) for name in _AUTOENCODER_FIGURES}
  scores |= {name: calm.get(name) for name in _CALM_FIGURES}
  return {
    **files.finite(scores),
    "train_tokens_per_second": files.finite(speeds),
    "seconds_total": seconds_total,
    "text_samples": [sample["prompt"] + sample["text"] for sample in accounts["calm"].samples],
    "versions": provenance.versions(),
    "commit": provenance.commit(),
  }


def table(summary: Mapping[str, Any]) -> str:
  """Returns the summary as aligned lines for a person; of the texts, the start of the first."""
  rows = []
  for name, value in summary.items():
    if isinstance(value, dict) and name != "versions":
      rows += [(f"{name}.{key}", _shown(part)) for key, part in value.items()]
    elif isinstance(value, dict):
      rows.append((name, ", ".join(f"{key} {_shown(part)}" for key, part in value.items())))
    elif isinstance(value, list):
      rows.append((name, _shown_texts(value)))
    else:
      rows.append((name, _shown(value)))
  width = max(len(name) for name, _ in rows)
  return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _shown(value: Any) -> str:
  if value is None:
    return "-"
  return f"{value:.6g}" if isinstance(value, float) else str(value)


def _shown_texts(texts: Sequence[str]) -> str:
  if not texts:
    return "-"
  start = repr(texts[0][:_SHOWN_LETTERS]) + ("..." if len(texts[0]) > _SHOWN_LETTERS else "")
  return f"{len(texts)}, the first: {start}"


def write(summary: Mapping[str, Any], output: str) -> None:
  """Writes summary.json into the folder `output`.

  Raises:
    CalmError: if it can't be written.
  """
  files.write(epath.Path(output) / FILE, files.to_json(summary))
