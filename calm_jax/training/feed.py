"""Batches made ready by a thread: read and on the devices while the step before is computed."""

import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from calm_jax.data import pipeline
from calm_jax.parallel import mesh as mesh_lib

# Seconds between looks at whether a batch is still wanted.
POLL_SECONDS = 0.2


class Fed(NamedTuple):
  """A batch on the devices.

  Attributes:
    arrays: of all B rows. index: of this process's rows.
    position: of the data after it, see `pipeline.TrainingBatches.get_state`; of a batch
      that is given again and again, before it.
  """

  arrays: dict[str, jax.Array]
  index: np.ndarray
  position: dict[str, Any]


class Feed:
  """Endless batches of the training split, of which this process reads its own rows.

  Args:
    reuse: whether to give the first batch again and again.
  """

  def __init__(
    self, batches: pipeline.TrainingBatches, mesh: jax.sharding.Mesh, batch: int,
    rows: np.ndarray, reuse: bool = False,
  ):  # fmt: skip
    self._batches, self._mesh, self._batch, self._rows = batches, mesh, batch, rows
    self._reuse = reuse
    self._ready: queue.Queue[Fed | BaseException] = queue.Queue(maxsize=1)
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
    self._thread.start()

  def _work(self) -> None:
    fed: Any = None
    while not self._closed.is_set():
      try:
        if fed is None or not self._reuse:
          before, read = self._batches.get_state(), next(self._batches)
          arrays = mesh_lib.place_rows(self._mesh, dict(read), self._rows, self._batch)
          fed = Fed(arrays, read["index"], before if self._reuse else self._batches.get_state())
      except BaseException as error:  # For the loop to raise.
        fed = error
      while not self._closed.is_set():
        try:
          self._ready.put(fed, timeout=POLL_SECONDS)
          break
        except queue.Full:
          continue
      if isinstance(fed, BaseException):
        return

  def take(self, wanted: Callable[[], bool]) -> Fed | None:
    """Returns the next batch; None if none has come when `wanted` turns false."""
    while True:
      try:
        fed = self._ready.get(timeout=POLL_SECONDS)
      except queue.Empty:
        if not wanted():
          return None
        continue
      if isinstance(fed, BaseException):
        raise fed
      return fed

  def close(self) -> None:
    """Ends the thread, unless it hangs in a read."""
    self._closed.set()
    self._thread.join(timeout=10 * POLL_SECONDS)
