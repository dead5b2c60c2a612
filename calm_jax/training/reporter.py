"""Metrics of steps -> reports: read one step late, checked, and written every few steps."""

import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from calm_jax import config
from calm_jax.training import metrics, resuming, step


class Reporter:
  """Receives each step's figures while they are still being computed.

  Figures of a step are read once the next step has been dispatched, so that reporting
  never stalls the device.

  Attributes:
    voids: number of void steps among those read, which are not counted as steps.
    skipped_in_a_row: number of non-finite steps since the last finite one, among those read.
  """

  def __init__(
    self,
    run: config.Run,
    writer: metrics.Writer,
    flops_per_token: float,
    first_step: int,
    shown: Sequence[str],
  ):
    """Starts the timing.

    Args:
      flops_per_token: training FLOPs per token.
      first_step: the step that the attempt starts from.
      shown: names of the stage's own figures in the printed line of a report.
    """
    self._shown = ("loss", *shown, "gradient_norm", "tokens_per_second")
    self._run, self._writer = run, writer
    self._tokens_per_step = run.data.context * run.training.batch
    self._flops_per_step = flops_per_token * self._tokens_per_step
    self._lap_step = first_step
    self._pending: tuple[int, Mapping[str, jax.Array], np.ndarray] | None = None
    self.voids = self.skipped_in_a_row = 0
    self._lap_start = time.perf_counter()
    self._waited_for_data = 0.0
    self._paused = 0.0

  def wait_for_data(self, seconds: float) -> None:
    """Records seconds that the loop waited for a batch."""
    self._waited_for_data += seconds

  def pause(self, seconds: float) -> None:
    """Records seconds that were not training: compiling, evaluating, saving."""
    self._paused += seconds
    self._writer.pause(seconds)

  def push(
    self, done: int, figures: Mapping[str, jax.Array], indices: np.ndarray
  ) -> frozenset[str]:
    """Receives step number `done` (from 1) and finishes the step before it.

    Returns:
      The signals (see `step.SIGNALS`) that any process raised with the step before.

    Raises:
      NonFinite: see `flush`.
    """
    pending, self._pending = self._pending, (done, figures, indices)
    return self._finish(*pending) if pending else frozenset()

  def flush(self) -> None:
    """Waits for the last step that was received and finishes it.

    Raises:
      NonFinite: after training.max_skipped non-finite steps in a row.
    """
    if self._pending:
      pending, self._pending = self._pending, None
      self._finish(*pending)

  def _finish(
    self, done: int, figures: Mapping[str, jax.Array], indices: np.ndarray
  ) -> frozenset[str]:
    """Reports a step; returns the signals raised with it."""
    values = {name: float(value) for name, value in jax.device_get(dict(figures)).items()}
    signals = frozenset(name for name in step.SIGNALS if values.pop(name))
    if "void" in signals:
      self.voids += 1
    else:
      self._report(done, values, indices)
    return signals

  def _report(self, done: int, values: dict[str, float], indices: np.ndarray) -> None:
    self._writer.advance(1)
    settings = self._run.training
    self.skipped_in_a_row = int(values["skipped_in_a_row"])
    if not values.pop("finite"):
      self._skipped(done, values, indices)
    if done % settings.log_every and done != settings.steps:
      return
    now = time.perf_counter()
    seconds = max(now - self._lap_start - self._paused, 1e-9)
    tokens_per_second = self._tokens_per_step * (done - self._lap_step) / seconds
    values |= {
      "seconds": seconds,
      "data_wait_share": self._waited_for_data / seconds,
      "tokens_per_second": tokens_per_second,
      "patches_per_second": tokens_per_second * values.pop("patches_per_token"),
      "flops": self._flops_per_step * done,
    }
    self._lap_start, self._lap_step = now, done
    self._waited_for_data = self._paused = 0.0
    self._writer.write("train", done, values, self._shown)

  def _skipped(self, done: int, values: Mapping[str, float], indices: np.ndarray) -> None:
    in_a_row = self.skipped_in_a_row
    message = (
      f"step {done} was skipped: loss {values['loss']}, gradient norm {values['gradient_norm']}; "
      f"its batch holds examples {_ranges(indices)}"
    )
    metrics.show(message)
    if in_a_row >= self._run.training.max_skipped:
      message = f"{in_a_row} non-finite steps in a row, training.max_skipped; {message}"
      raise resuming.NonFinite(message, done - in_a_row)


def _ranges(indices: np.ndarray) -> str:
  """Returns indices as sorted ranges, such as `3-6, 9`."""
  ordered = np.unique(indices)
  runs = np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1)
  return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)
