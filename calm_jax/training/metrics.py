"""Figures of a run: a line a report, metrics.jsonl always, TensorBoard where it is installed."""

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from tqdm import tqdm

from calm_jax import distributed, files


def show(line: str) -> None:
  """Prints a line for a person, on standard error, past a progress bar; by process 0 alone."""
  if not distributed.is_first():
    return
  tqdm.write(line, file=sys.stderr)
  sys.stderr.flush()


class Pace:
  """Seconds that a step of this attempt takes: its first one and pauses do not count."""

  def __init__(self, clock: Callable[[], float]):
    self._clock, self._paused, self._steps = clock, 0.0, 0
    self.begun: float | None = None  # When the first step was over.
    self._last = 0.0

  def advance(self, steps: int) -> None:
    """Counts finished steps."""
    self._last = self._clock()
    if self.begun is None:
      self.begun = self._last
    else:
      self._steps += steps

  def pause(self, seconds: float) -> None:
    """Takes out seconds that were not training."""
    if self.begun is not None:
      self._paused += seconds

  def left(self, steps: int) -> str:
    """Returns the time of so many more steps, for people; "" before it is known."""
    if self.begun is None or not self._steps:
      return ""
    spent = max(0.0, self._last - self.begun - self._paused)
    minutes, seconds = divmod(int(spent / self._steps * steps), 60)
    hours, days = minutes // 60, minutes // (24 * 60)
    if days:
      return f"{days}d{hours % 24:02d}h"
    return f"{hours}h{minutes % 60:02d}m" if hours else f"{minutes}m{seconds:02d}s"


class Writer:
  """Writes figures as they come, process-wide once, by process 0 alone.

  On a terminal a progress bar shows rate and time left; elsewhere each report is
  a plain line.
  """

  def __init__(
    self,
    path: epath.Path,
    steps: int,
    first_step: int,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._path, self._steps = path, steps
    self._pace = Pace(clock)
    self._writes = distributed.is_first()
    self._kept = self._drop_after(first_step) if self._writes else set()
    quiet = not (self._writes and sys.stderr.isatty())
    self._bar = tqdm(total=steps, initial=first_step, unit="step", disable=quiet, leave=True)
    self._board = None
    if self._writes and importlib.util.find_spec("tensorboardX"):
      board = importlib.import_module("tensorboardX")
      self._board = board.SummaryWriter(str(path.parent / "tensorboard"))

  def _drop_after(self, step: int) -> set[tuple[str, int]]:
    """Forgets reports after `step`, which a resumed run writes again; returns what is kept."""
    if not self._path.exists():
      return set()
    lines, kept = [], set()
    for line in self._path.read_text().splitlines():
      try:
        record = json.loads(line)
      except ValueError:
        continue  # The last line of a killed run may be cut.
      if record["step"] <= step:
        lines.append(line + "\n")
        kept.add((record["kind"], record["step"]))
    files.write(self._path, "".join(lines))
    return kept

  def has(self, kind: str, step: int) -> bool:
    """Tells, on every process, whether the run wrote this report before it was resumed."""
    return distributed.from_first("has", str((kind, step) in self._kept)) == "True"

  def write(
    self, kind: str, step: int, values: Mapping[str, Any], shown: Sequence[str] = ()
  ) -> None:
    """Writes one report: {"kind", "step", "time", ...}; `step` counts finished steps.

    Args:
      shown: the figures that the printed line names.

    Raises:
      CalmError: if it can't be written.
    """
    if not self._writes:
      return
    record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
    files.append(self._path, json.dumps(files.finite(record)) + "\n")
    if self._board:
      for name, value in values.items():
        if isinstance(value, (int, float)):
          self._board.add_scalar(f"{kind}/{name}", value, step)
    figures = "  ".join(f"{name} {values[name]:.6g}" for name in shown if name in values)
    time_left = self._pace.left(self._steps - step)
    left = f"  {time_left} left" if kind == "train" and time_left else ""
    show(f"{kind} {step}/{self._steps}  {figures}{left}")

  def advance(self, steps: int) -> None:
    """Counts finished steps and moves the progress bar."""
    if self._pace.begun is None:
      self._bar.unpause()  # What came before, compiling too, is no step's time.
    self._pace.advance(steps)
    self._bar.update(steps)

  def pause(self, seconds: float) -> None:
    """Takes seconds that were not training, and have just passed, out of the time of steps."""
    self._pace.pause(seconds)
    self._bar.unpause()

  def close(self) -> None:
    self._bar.close()
    if self._board:
      self._board.close()
