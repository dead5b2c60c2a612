"""Figures of a run: a line a report, metrics.jsonl always, TensorBoard where it is installed."""

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Mapping, Sequence
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


class Writer:
  """Writes figures as they come, process-wide once, by process 0 alone.

  On a terminal a progress bar shows rate and time left; elsewhere each report is
  a plain line.
  """

  def __init__(self, path: epath.Path, steps: int, first_step: int):
    self._path = path
    self._steps, self._first_step = steps, first_step
    self._started = time.monotonic()
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
    left = f"  {self._seconds_left(step)} left" if kind == "train" else ""
    show(f"{kind} {step}/{self._steps}  {figures}{left}")

  def _seconds_left(self, step: int) -> str:
    done = max(1, step - self._first_step)
    seconds = (time.monotonic() - self._started) / done * (self._steps - step)
    return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"

  def advance(self, steps: int) -> None:
    """Moves the progress bar."""
    self._bar.update(steps)

  def close(self) -> None:
    self._bar.close()
    if self._board:
      self._board.close()
