"""An account of a language model -> pictures: BrierLM, its parts, calibration."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calm_jax.objectives import brier
from calm_jax.reporting import drawing, records

_PART_COLORS = (drawing.SKY, drawing.GREEN, drawing.ORANGE, drawing.PURPLE)
_MARGINAL = "brier_lm_marginal"


def _brier(figure: Figure, account: records.Account, x: np.ndarray) -> Axes:
  axes, reports = figure.subplots(), account.evaluations
  for n, color in enumerate(_PART_COLORS, start=1):
    drawing.evaluated(axes, x, reports, f"brier_{n}", f"Brier-{n}", color, width=1.0)
  drawing.evaluated(
    axes, x, reports, "brier_lm", "BrierLM ± 1 standard error", drawing.BLACK, width=2.4
  )
  marginal = (account.evaluation or {}).get(_MARGINAL)
  if marginal is not None:
    axes.axhline(
      marginal, color=drawing.VERMILLION, linestyle="--", label=f"marginal, {marginal:.3g}"
    )
  axes.set_ylabel("score (%)")
  axes.set_ylim(bottom=0)
  figure.legend(loc="outside upper center", ncols=3)
  return axes


def _brier_over_steps(figure: Figure, account: records.Account) -> None:
  axes = _brier(figure, account, records.column(account.evaluations, "step"))
  drawing.step_axis(axes)


def _brier_over_flops(figure: Figure, account: records.Account) -> None:
  flops = records.column(account.evaluations, "flops")
  axes = _brier(figure, account, flops)
  if np.nanmax(flops) >= 10 * np.nanmin(flops) > 0:
    axes.set_xscale("log")
  axes.set_xlabel("training FLOPs")


def _no_marginal(account: records.Account) -> str:
  if (account.evaluation or {}).get(_MARGINAL) is not None:
    return ""
  return f"The line of the marginal is missing; this command adds it: {account.evaluate_command}"


def _calibration(figure: Figure, account: records.Account) -> None:
  grid = figure.subplots(2, 2, sharex=True)
  steps = records.column(account.evaluations, "step")
  for n, axes in enumerate(grid.flat, start=1):
    accuracy, collision = (
      records.column(account.evaluations, f"{name}_{n}") for name in ("accuracy", "collision")
    )
    for values, color in ((accuracy, drawing.BLUE), (collision, drawing.VERMILLION)):
      axes.plot(
        steps, values, color=color, marker=drawing.marker(account.evaluations), markersize=2.5
      )
    for where, color in (
      (collision > accuracy, drawing.VERMILLION),
      (collision <= accuracy, drawing.BLUE),
    ):
      axes.fill_between(
        steps,
        accuracy,
        collision,
        where=where,
        interpolate=True,
        color=color,
        alpha=0.15,
        linewidth=0,
      )
    axes.set_title(f"n = {n}", fontsize=10)
    axes.set_ylim(bottom=0)
  drawing.step_axis(grid[1, 0])
  drawing.step_axis(grid[1, 1])
  figure.supylabel("share (%)", fontsize=10)
  lines = grid[0, 0].get_lines()
  figure.legend(lines, ("accuracy", "collision"), loc="outside upper center", ncols=2)


_BRIER_CAPTION = (
  "Higher is better. BrierLM is the geometric mean of Brier-1 to Brier-4. The marginal is the "
  "score of a model that ignores its context: only the part above it comes from using the context."
)

PICTURES = (
  drawing.Picture(
    "BrierLM over steps",
    "evaluations",
    "brier_lm",
    _BRIER_CAPTION,
    _brier_over_steps,
    _no_marginal,
  ),
  drawing.Picture(
    "BrierLM over training FLOPs",
    "evaluations",
    "flops",
    f"The same scores by the training compute they cost. {_BRIER_CAPTION}",
    _brier_over_flops,
    _no_marginal,
  ),
  drawing.Picture(
    f"Accuracy against collision, n = 1 to {brier.ORDERS}",
    "evaluations",
    "accuracy_1",
    "Accuracy: share of samples whose first n tokens are the text's. Collision: share of pairs of "
    "samples whose first n tokens are equal. A calibrated model has both equal; collision above "
    "accuracy means too little diversity, below it too much.",
    _calibration,
  ),
)
