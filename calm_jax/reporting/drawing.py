"""Elements of all pictures: colours, axes, curves with error bands, and PNG output."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from calm_jax.reporting import records

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (
  "#0072B2",
  "#D55E00",
  "#009E73",
  "#CC79A7",
  "#E69F00",
  "#56B4E9",
)
BLACK, GREY = "#222222", "#777777"

STYLE: dict[Any, Any] = {
  "figure.figsize": (6.6, 3.9),
  "figure.constrained_layout.use": True,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "axes.edgecolor": GREY,
  "axes.labelsize": 10,
  "grid.color": "#e6e6e6",
  "font.size": 9.5,
  "legend.fontsize": 8.5,
  "legend.framealpha": 0.85,
  "legend.edgecolor": "none",
  "lines.linewidth": 1.6,
}
_DPI = 180
_MANY = 60  # Number of reports from which curves are smoothed and drawn without markers.
_WIDE = 20  # Ratio of largest to smallest value above which an axis becomes logarithmic.


@dataclasses.dataclass(frozen=True)
class Picture:
  """A picture of an account.

  Attributes:
    source: the account's field that it draws: "train", "evaluations", "evaluation" or "tradeoff".
    needs: figure that the source must have for the picture to be drawn.
    caption: how to read the picture.
    draw: draws an account on a figure.
    caveat: account -> a sentence on what this picture lacks, or "".
    flags: flags of evaluate that produce its figures, if it needs any.
  """

  title: str
  source: str
  needs: str
  caption: str
  draw: Callable[[Figure, records.Account], None]
  caveat: Callable[[records.Account], str] = lambda account: ""
  flags: str = ""

  def png(self, account: records.Account) -> bytes | None:
    """Returns the picture, or None if its figures are missing."""
    if not self._can_be_drawn(account):
      return None
    with matplotlib.rc_context(STYLE):
      figure, buffer = Figure(), io.BytesIO()
      self.draw(figure, account)
      figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()

  def _can_be_drawn(self, account: records.Account) -> bool:
    single = {"evaluation": account.best_evaluation, "tradeoff": account.tradeoff}
    if self.source in single:
      return bool((single[self.source] or {}).get(self.needs))
    return bool(np.isfinite(records.column(getattr(account, self.source), self.needs)).any())


def step_axis(axes: Axes) -> None:
  """Labels the x axis as optimizer steps from 0: whole numbers, thousands as k."""
  axes.set_xlabel("optimizer steps")
  axes.set_xlim(left=0)
  axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
  axes.xaxis.set_major_formatter(
    FuncFormatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 10_000 else f"{x:g}")
  )


def log_y(axes: Axes, only_if_wide: bool = False) -> None:
  """Makes the y axis logarithmic if any drawn value is positive.

  Args:
    only_if_wide: require also that all values are positive and span more than a factor of 20.
  """
  values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()])
  values = values[np.isfinite(values)]
  positive = values[values > 0]
  if not len(positive):
    return
  is_wide = len(positive) == len(values) and positive.max() > _WIDE * positive.min()
  if is_wide or not only_if_wide:
    axes.set_yscale("log", nonpositive="mask")
    is_narrow = positive.max() < 100 * positive.min()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def marker(reports: Sequence[records.Record]) -> str:
  """Returns the marker of a curve: a dot per report, or none where dots would merge."""
  return "o" if len(reports) < _MANY else ""


def trace(
  axes: Axes, account: records.Account, name: str, label: str, color: str, scale: float = 1.0
) -> None:
  """Draws a training figure over steps: few reports as dots, many as a running mean."""
  values = scale * records.column(account.train, name)
  steps = records.column(account.train, "step")
  finite = np.isfinite(values)
  if not finite.any():
    return
  if finite.sum() < _MANY:
    axes.plot(steps, values, color=color, label=label, marker="o", markersize=2)
    return
  window = max(5, int(finite.sum()) // 40)
  mean = np.convolve(values[finite], np.ones(window) / window, mode="valid")
  middle = steps[finite][(window - 1) // 2 :][: len(mean)]
  axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
  axes.plot(middle, mean, color=color, label=f"{label}, mean of {window} reports")


def evaluated(
  axes: Axes,
  x: np.ndarray,
  reports: Sequence[records.Record],
  name: str,
  label: str,
  color: str,
  scale: float = 1.0,
  width: float = 1.6,
) -> None:
  """Draws an evaluation figure over `x`, with a band of one standard error if it has one."""
  values = scale * records.column(reports, name)
  if not np.isfinite(values).any():
    return
  stderr = scale * records.column(reports, f"{name}_stderr")
  axes.plot(
    x, values, color=color, label=label, marker=marker(reports), markersize=3, linewidth=width
  )
  if np.isfinite(stderr).any():
    axes.fill_between(x, values - stderr, values + stderr, color=color, alpha=0.2, linewidth=0)


def panels(figure: Figure, count: int, heights: Sequence[float] | None = None) -> list[Axes]:
  """Returns `count` panels, stacked vertically on a shared x axis."""
  grid = figure.subplots(count, 1, sharex=True, height_ratios=heights or [1] * count)
  return list(grid)
