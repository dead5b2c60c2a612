"""What all pictures share: colours, axes, curves with bands, and the way to PNG."""

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

# Okabe and Ito's colours, told apart by colour-blind readers too.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (
  "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
)  # fmt: skip
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
_MANY = 60  # Reports from which curves are smoothed and lose their dots.
_WIDE = 20  # Largest over smallest value from which an axis becomes logarithmic.


@dataclasses.dataclass(frozen=True)
class Picture:
  """A picture of an account and when it can be drawn.

  Attributes:
    source: "train", "evaluations", "evaluation" or "tradeoff" of the account.
    needs: the figure without which there is nothing to draw.
    caption: what to look for.
    caveat: an account -> a sentence on what this picture lacks, or "".
    flags: of evaluate, where they make the figures.
  """

  title: str
  source: str
  needs: str
  caption: str
  draw: Callable[[Figure, records.Account], None]
  caveat: Callable[[records.Account], str] = lambda account: ""
  flags: str = ""

  def png(self, account: records.Account) -> bytes | None:
    """Returns the picture, or None where its figures are missing."""
    if not self._can_be_drawn(account):
      return None
    with matplotlib.rc_context(STYLE):
      figure, buffer = Figure(), io.BytesIO()
      self.draw(figure, account)
      figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()

  def _can_be_drawn(self, account: records.Account) -> bool:
    whole = {"evaluation": account.best_evaluation, "tradeoff": account.tradeoff}
    if self.source in whole:
      return bool((whole[self.source] or {}).get(self.needs))
    return bool(np.isfinite(records.column(getattr(account, self.source), self.needs)).any())


def step_axis(axes: Axes) -> None:
  """Labels x as optimizer steps from 0 on: whole numbers, thousands as k."""
  axes.set_xlabel("optimizer steps")
  axes.set_xlim(left=0)
  axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
  axes.xaxis.set_major_formatter(
    FuncFormatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 10_000 else f"{x:g}")
  )


def log_y(axes: Axes, only_if_wide: bool = False) -> None:
  """Makes y logarithmic if what is drawn has positive values, or only if they span a lot."""
  values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()])
  values = values[np.isfinite(values)]
  positive = values[values > 0]
  if not len(positive):
    return
  wide = len(positive) == len(values) and positive.max() > _WIDE * positive.min()
  if wide or not only_if_wide:
    axes.set_yscale("log", nonpositive="mask")
    narrow = positive.max() < 100 * positive.min()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def marker(reports: Sequence[records.Record]) -> str:
  """Returns the marker of a curve: a dot a report while there are few, none where dots merge."""
  return "o" if len(reports) < _MANY else ""


def trace(
  axes: Axes, account: records.Account, name: str, label: str, color: str, scale: float = 1.0
) -> None:
  """Draws a training figure over steps: each report faint, their running mean strong."""
  values = scale * records.column(account.train, name)
  steps = records.column(account.train, "step")
  good = np.isfinite(values)
  if not good.any():
    return
  if good.sum() < _MANY:
    axes.plot(steps, values, color=color, label=label, marker="o", markersize=2)
    return
  window = max(5, int(good.sum()) // 40)
  mean = np.convolve(values[good], np.ones(window) / window, mode="valid")
  middle = steps[good][(window - 1) // 2 :][: len(mean)]
  axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
  axes.plot(middle, mean, color=color, label=f"{label}, mean of {window} reports")


def evaluated(
  axes: Axes, x: np.ndarray, reports: Sequence[records.Record], name: str, label: str,
  color: str, scale: float = 1.0, width: float = 1.6,
) -> None:  # fmt: skip
  """Draws an evaluation figure over `x` with a band of one standard error, where there is one."""
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
  """Returns `count` panels, one above the other with one x axis."""
  grid = figure.subplots(count, 1, sharex=True, height_ratios=heights or [1] * count)
  return list(grid)
