"""Source -> batches on the devices, by a thread that reads ahead of the loop."""

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from calm_jax.data import pipeline
from calm_jax.parallel import mesh as mesh_lib

# Seconds between checks of whether a batch is still needed.
POLL_SECONDS = 0.2


def abstract_batch(
  fields: Mapping[str, pipeline.Field], mesh: jax.sharding.Mesh, batch: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes, types and shardings of a batch's arrays on the mesh."""
  sharding = NamedSharding(mesh, mesh_lib.spec("batch"))
  return {
    name: jax.ShapeDtypeStruct((batch, *field.shape), field.dtype, sharding=sharding)
    for name, field in fields.items()
  }


def blank_batch(
  fields: Mapping[str, pipeline.Field], mesh: jax.sharding.Mesh, batch: int
) -> dict[str, jax.Array]:
  """Returns a batch of zeros on the devices, for void steps."""
  rows = mesh_lib.own_rows(mesh, batch)
  zeros = {name: np.zeros((len(rows), *field.shape), field.dtype) for name, field in fields.items()}
  return mesh_lib.place_rows(mesh, zeros, rows, batch)


class Fed(NamedTuple):
  """A batch on the devices.

  Attributes:
    arrays: all B rows of each field.
    index: the examples' numbers, of this process's rows only.
    position: what a run that is resumed after this batch starts from, see
      `pipeline.Source.get_state`: the position after this batch, or its own if it is reused.
  """

  arrays: dict[str, jax.Array]
  index: np.ndarray
  position: dict[str, Any]


class Feed:
  """Endless batches of a source on the devices, two of them ready ahead of the loop.

  Args:
    batch: B, rows of a batch.
    rows: those of them that `source` reads, see `mesh.own_rows`.
    reuse: whether every batch is the first one.
  """

  def __init__(
    self,
    source: pipeline.Source,
    mesh: jax.sharding.Mesh,
    batch: int,
    rows: np.ndarray,
    reuse: bool = False,
  ):
    self._source, self._mesh, self._batch, self._rows = source, mesh, batch, rows
    self._reuse = reuse
    # One batch waits here, and a second one in the thread for its turn.
    self._ready: queue.Queue[Fed | BaseException] = queue.Queue(maxsize=1)
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
    self._thread.start()

  def _work(self) -> None:
    try:
      with jax.set_mesh(self._mesh):  # For a source that computes: the mesh is the thread's own.
        fed = self._next()
        while self._put(fed):
          fed = fed if self._reuse else self._next()
    except BaseException as error:  # For the loop to raise.
      self._put(error)

  def _next(self) -> Fed:
    position = self._source.get_state()
    read = next(self._source)
    arrays = mesh_lib.place_rows(self._mesh, dict(read), self._rows, self._batch)
    return Fed(arrays, read["index"], position if self._reuse else self._source.get_state())

  def _put(self, fed: Fed | BaseException) -> bool:
    """Waits for room in the queue; returns False if the feed was closed first."""
    while not self._closed.is_set():
      try:
        self._ready.put(fed, timeout=POLL_SECONDS)
        return True
      except queue.Full:
        continue
    return False

  def take(self, is_needed: Callable[[], bool]) -> Fed | None:
    """Returns the next batch; None if none is ready when `is_needed` turns false.

    Raises:
      Whatever the source raised.
    """
    while True:
      try:
        fed = self._ready.get(timeout=POLL_SECONDS)
      except queue.Empty:
        if not is_needed():
          return None
        continue
      if isinstance(fed, BaseException):
        raise fed
      return fed

  def close(self) -> None:
    """Ends the thread, unless it is blocked in a read."""
    self._closed.set()
    self._thread.join(timeout=10 * POLL_SECONDS)
