"""Accounts of a model and its parents -> one mapping of their final figures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from calm_jax import config, errors, files, workdir
from calm_jax.reporting import provenance, records

FILE = "summary.json"
_SHOWN_CHARACTERS = 80


def summarize(accounts: Sequence[records.Account], seconds_total: float | None) -> dict[str, Any]:
  """Returns the final figures of a model and its parents; None for one that does not exist.

  Scores of language models are in percent, the accuracies of an autoencoder are shares.

  Args:
    accounts: accounts of the parents, followed by that of the model, whose texts are included.

  Raises:
    CalmError: if one of them was not evaluated, or `seconds_total` is not finite.
  """
  config.require(
    seconds_total is None or math.isfinite(seconds_total),
    f"--seconds_total must be finite, got {seconds_total}",
  )
  scores = {}
  for account in accounts:
    if account.evaluation is None:
      raise errors.CalmError(
        f"{account.directory} has no {workdir.EVALUATION}, which the summary needs: run "
        f"{account.evaluate_command}"
      )
    figure_of = account.presentation.summary
    scores |= {name: account.evaluation.get(figure) for name, figure in figure_of.items()}
  speeds = {account.run.stage: records.tokens_per_second(account) for account in accounts}
  return {
    **files.finite(scores),
    "train_tokens_per_second": files.finite(speeds),
    "seconds_total": seconds_total,
    "text_samples": [sample["prompt"] + sample["text"] for sample in accounts[-1].samples],
    "versions": provenance.versions(),
    "commit": provenance.commit(),
  }


def table(summary: Mapping[str, Any]) -> str:
  """Returns the summary as aligned lines, with the start of the first text."""
  rows = []
  for name, value in summary.items():
    if isinstance(value, dict) and name != "versions":
      rows += [(f"{name}.{key}", _format(part)) for key, part in value.items()]
    elif isinstance(value, dict):
      rows.append((name, ", ".join(f"{key} {_format(part)}" for key, part in value.items())))
    elif isinstance(value, list):
      rows.append((name, _format_texts(value)))
    else:
      rows.append((name, _format(value)))
  width = max(len(name) for name, _ in rows)
  return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _format(value: Any) -> str:
  if value is None:
    return "-"
  return f"{value:.6g}" if isinstance(value, float) else str(value)


def _format_texts(texts: Sequence[str]) -> str:
  if not texts:
    return "-"
  is_cut = len(texts[0]) > _SHOWN_CHARACTERS
  start = repr(texts[0][:_SHOWN_CHARACTERS]) + ("..." if is_cut else "")
  return f"{len(texts)}, the first: {start}"


def write(summary: Mapping[str, Any], output: str) -> None:
  """Writes summary.json into the folder `output`.

  Raises:
    CalmError: if it can't be written.
  """
  files.write(epath.Path(output) / FILE, files.to_json(summary))
