"""Figures of a run -> printed lines, metrics.jsonl, and TensorBoard where it is installed.

A resumed run drops the reports after its checkpoint, moves lines that can't be read to a
file of their own, and writes TensorBoard's last minutes again, which a kill may have lost.
"""

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from tqdm import tqdm

from calm_jax import config, distributed, errors, files

# Suffix of files that are set aside.
UNREADABLE = ".unreadable"
# Seconds of reports that TensorBoard receives again: more than its writer ever buffers.
REPLAY_SECONDS = 600

Record = dict[str, Any]


def show(line: str) -> None:
  """Prints a line on standard error, above a progress bar; on process 0 only."""
  if not distributed.is_first():
    return
  tqdm.write(line, file=sys.stderr)
  sys.stderr.flush()


class Pace:
  """Mean seconds of a step of this attempt, without the first step and without pauses."""

  def __init__(self, clock: Callable[[], float]):
    self._clock, self._paused, self._steps = clock, 0.0, 0
    self.begun: float | None = None  # When the first step ended.
    self._last_advance = 0.0

  def advance(self, steps: int) -> None:
    """Counts finished steps."""
    self._last_advance = self._clock()
    if self.begun is None:
      self.begun = self._last_advance
    else:
      self._steps += steps

  def pause(self, seconds: float) -> None:
    """Excludes seconds that were not training."""
    if self.begun is not None:
      self._paused += seconds

  def left(self, steps: int) -> str:
    """Returns the time that `steps` more steps take, as `2h05m`; "" before it is known."""
    if self.begun is None or not self._steps:
      return ""
    spent = max(0.0, self._last_advance - self.begun - self._paused)
    minutes, seconds = divmod(int(spent / self._steps * steps), 60)
    hours, days = minutes // 60, minutes // (24 * 60)
    if days:
      return f"{days}d{hours % 24:02d}h"
    return f"{hours}h{minutes % 60:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def parse_lines(content: bytes) -> tuple[list[Record], list[bytes]]:
  """Returns the reports in metrics.jsonl, and the lines that are not reports."""
  good, bad = [], []
  for line in content.split(b"\n"):
    if not line.strip():
      continue
    try:
      record = files.parse_json(line, "a report")
      is_valid = type(record.get("step")) is int and isinstance(record.get("kind"), str)
      is_valid = is_valid and isinstance(record.get("time", 0.0), int | float)
    except errors.CalmError:
      record, is_valid = {}, False
    if is_valid:
      good.append(record)
    else:
      bad.append(line)
  return good, bad


def last_step(path: epath.Path) -> int:
  """Returns the last step that metrics.jsonl reports; 0 if there is none."""
  records = parse_lines(files.read(path))[0] if path.exists() else []
  return max((record["step"] for record in records), default=0)


class Writer:
  """Writes reports as they come, on process 0 only.

  On a terminal, a progress bar shows rate and time left; elsewhere each report is a plain
  line.
  """

  def __init__(
    self,
    path: epath.Path,
    steps: int,
    first_step: int,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._path, self._steps, self._first_step = path, steps, first_step
    self._pace = Pace(clock)
    self._writes = distributed.is_first()
    kept_records = self._drop_after(first_step) if self._writes else []
    self._kept = {(record["kind"], record["step"]) for record in kept_records}
    is_quiet = not (self._writes and sys.stderr.isatty())
    self._bar = tqdm(total=steps, initial=first_step, unit="step", disable=is_quiet, leave=True)
    self._board: Any = None
    if self._writes and importlib.util.find_spec("tensorboardX"):
      self._open_board(kept_records)

  def _drop_after(self, step: int) -> list[Record]:
    """Removes reports after `step`, which a resumed run writes again; returns the others."""
    if not self._path.exists():
      return []
    content = files.read(self._path)
    kept_records, bad = parse_lines(content)
    kept_records = [record for record in kept_records if record["step"] <= step]
    if bad:
      aside = self._path.parent / f"{self._path.name}{UNREADABLE}"
      earlier = files.read(aside) if aside.exists() else b""
      files.write(aside, earlier + b"".join(line + b"\n" for line in bad))
      show(f"{self._path} holds {len(bad)} line(s) that can't be read: moved to {aside}")
    text = "".join(json.dumps(record) + "\n" for record in kept_records)
    if text.encode() != content:
      files.write(self._path, text)
    return kept_records

  def _open_board(self, kept_records: Sequence[Record]) -> None:
    """Opens TensorBoard's writer and completes its history."""
    folder = self._path.parent / "tensorboard"
    since = (
      kept_records[-1].get("time", 0.0) - REPLAY_SECONDS
      if kept_records and folder.exists()
      else 0.0
    )
    recent = (record["step"] for record in kept_records if record.get("time", 0.0) >= since)
    first = min([self._first_step + 1, *recent])
    board = importlib.import_module("tensorboardX")
    # TensorBoard ignores what earlier attempts wrote from step `first` on.
    self._board = board.SummaryWriter(str(folder), purge_step=first)
    for record in kept_records:
      if record["step"] < first:
        continue
      values = {name: x for name, x in record.items() if name not in ("kind", "step", "time")}
      self._add_scalars(record["kind"], record["step"], values, record.get("time"))

  def _add_scalars(
    self, kind: str, step: int, values: Mapping[str, Any], walltime: float | None = None
  ) -> None:
    for name, value in values.items():
      if isinstance(value, (int, float)) and not abs(value) > config.FLOATS[1]:
        self._board.add_scalar(f"{kind}/{name}", value, step, walltime)

  def has(self, kind: str, step: int) -> bool:
    """Returns, on every process, whether an earlier attempt of the run wrote this report."""
    return distributed.from_first("has", str((kind, step) in self._kept)) == "True"

  def write(
    self, kind: str, step: int, values: Mapping[str, Any], shown: Sequence[str] = ()
  ) -> None:
    """Writes one report: {"kind", "step", "time", ...}; `step` counts finished steps.

    Args:
      shown: names of the figures in the printed line.

    Raises:
      CalmError: if it can't be written.
    """
    if not self._writes:
      return
    record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
    files.append(self._path, json.dumps(files.finite(record)) + "\n")
    if self._board:
      self._add_scalars(kind, step, values)
    figures = "  ".join(f"{name} {values[name]:.6g}" for name in shown if name in values)
    time_left = self._pace.left(self._steps - step)
    left = f"  {time_left} left" if kind == "train" and time_left else ""
    show(f"{kind} {step}/{self._steps}  {figures}{left}")

  def advance(self, steps: int) -> None:
    """Counts finished steps and moves the progress bar."""
    if self._pace.begun is None:
      self._bar.unpause()  # Excludes the time before, such as compiling.
    self._pace.advance(steps)
    self._bar.update(steps)

  def pause(self, seconds: float) -> None:
    """Excludes the last `seconds`, which were not training, from the time of steps."""
    self._pace.pause(seconds)
    self._bar.unpause()

  def close(self) -> None:
    self._bar.close()
    if self._board:
      self._board.close()
