"""Checkpoints through Orbax: the one module that knows how a state lies on disk.

A checkpoint holds `params`, `rest` (optimizer and counters) and `meta` (data
position, config, hashes, fingerprints). Parameters can be read alone.
"""

import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax import numpy as jnp

from calm_jax import distributed, errors, files
from calm_jax.training import metrics

DIRECTORY = "checkpoints"
UNREADABLE = "checkpoints_unreadable"

Tree = Any
Report = Callable[[str], None]


@jax.jit
def _sums_of_bits(leaves: list[jax.Array]) -> list[jax.Array]:
  """In one program: many with sums over devices, all on their way at once, can block each other."""

  def one(leaf):
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    return jnp.sum(jax.lax.bitcast_convert_type(leaf, unsigned), dtype=jnp.uint32)

  return [one(leaf) for leaf in leaves]


def fingerprint(tree: Tree) -> str:
  """Returns 8 hex digits over the bits of every leaf, the same for every sharding.

  A wrap-around sum a leaf: it finds damage, not malice.
  """
  total = 0
  for part in jax.device_get(_sums_of_bits(jax.tree.leaves(tree))):
    total = (total * 1_000_003 + int(part)) % 2**32
  return f"{total:08x}"


@functools.cache
def _ignore_stragglers() -> None:
  """Silences the reads and writes that are still under way when Orbax gives up on others.

  Each would print that its event loop is closed, that it was never awaited, or the
  error that has been told already.
  """
  previous = sys.unraisablehook
  warnings.filterwarnings("ignore", message="coroutine .* was never awaited")

  def hook(unraisable):
    code = getattr(unraisable.object, "cr_code", None)  # Where the coroutine was written.
    late = code is not None and "orbax" in code.co_filename
    if not late and str(unraisable.exc_value) != "Event loop is closed":
      previous(unraisable)

  sys.unraisablehook = hook


def few_gb(tree: Tree) -> int:
  """Returns the least `concurrent_gb` that every leaf fits, for where memory is short."""
  return 1 + max(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) // 2**30


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint read back. `rest` is None where only the parameters were asked for."""

  step: int
  params: Tree
  rest: Tree
  meta: dict[str, Any]


class Checkpoints:
  """The checkpoints of one workdir: saved in the background, whole or not at all."""

  def __init__(
    self,
    workdir: str,
    keep_latest: int | None = None,
    keep_every: int = 0,
    report: Report = metrics.show,
    concurrent_gb: int = 96,
  ):
    """Opens them to be read, or, given `keep_latest`, to be written.

    A reader changes nothing, so that a run can be looked at while it trains.

    Args:
      concurrent_gb: what may be under way at once, in memory beside the state; see
        `few_gb`.

    Raises:
      CalmError: if they can't be written there.
    """
    _ignore_stragglers()
    self._workdir = epath.Path(workdir)
    self._report = report
    reads = keep_latest is None
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep_latest,
      keep_period=keep_every or None,
      cleanup_tmp_directories=not reads,
      create=not reads,
      read_only=reads,
    )
    trees = functools.partial(
      ocp.StandardCheckpointHandler,
      save_concurrent_gb=concurrent_gb,
      restore_concurrent_gb=concurrent_gb,
    )
    handlers = {
      "params": trees(),
      "rest": trees(),
      "meta": ocp.JsonCheckpointHandler(),
    }
    try:
      self._manager = ocp.CheckpointManager(
        files.absolute(self._workdir / DIRECTORY), options=options, item_handlers=handlers
      )
    except Exception as error:  # A bucket's client raises errors of its own.
      reason = _first_line(error)
      raise errors.CalmError(f"can't open the checkpoints of {workdir}: {reason}") from error

  def steps(self) -> list[int]:
    """Returns the steps of whole checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, params: Tree, rest: Tree | None, meta: dict[str, Any]) -> bool:
    """Starts saving and returns at once. Returns False, and says why, if saving fails.

    A failure of the save before this one is told here. Older checkpoints stay as
    they were. `rest` is None for parameters that are never trained on.
    """
    trees = {"params": params} if rest is None else {"params": params, "rest": rest}
    prints = {f"{name}_fingerprint": fingerprint(tree) for name, tree in trees.items()}
    args = ocp.args.Composite(
      meta=ocp.args.JsonSave(meta | prints),
      **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
    )
    self.wait()
    return self._attempt(f"step {step}", lambda: self._manager.save(step, args=args))

  def wait(self) -> bool:
    """Waits for the save under way; returns False, and says why, if it failed."""
    return self._attempt("the last step", self._manager.wait_until_finished)

  def _attempt(self, what: str, action: Callable[[], Any]) -> bool:
    try:
      action()
    except Exception as error:  # Orbax passes on whatever the file system raised.
      self._manager.reload()
      good = self.steps()
      self._report(
        f"saving the checkpoint of {what} failed ({_first_line(error)}); the last good one is "
        f"{f'step {good[-1]}' if good else 'none'}"
      )
      return False
    return True

  def restore(self, params: Tree, rest: Tree = None) -> Restored | None:
    """Returns the newest checkpoint that reads back whole, None where there is none at all.

    Args:
      params, rest: abstract trees; without `rest` only parameters are read.

    Raises:
      CalmError: if there are checkpoints and none of them can be read.
    """
    steps = self.steps()
    for step in reversed(steps):
      found, problem = None, ""
      try:
        found = self._read(step, params, rest)
      except Exception as error:  # Damage shows as any error of Orbax or TensorStore.
        problem = _first_line(error)
      problem = next(filter(None, distributed.exchange("restored", problem)), "")
      if not problem:
        return found
      found = None
      self._report(
        f"the checkpoint of step {step} in {self._workdir} can't be read ({problem})"
        + ("; falling back to the one before" if step != steps[0] else "")
      )
    if steps:
      raise errors.CalmError(
        f"none of the checkpoints in {self._workdir / DIRECTORY} can be read (steps {steps}): "
        "start again in a new workdir"
      )
    return None

  def _read(self, step: int, params: Tree, rest: Tree) -> Restored:
    items: dict[str, Any] = {
      "params": ocp.args.StandardRestore(params),
      "meta": ocp.args.JsonRestore(),
    }
    if rest is not None:
      items["rest"] = ocp.args.StandardRestore(rest)
    read = self._manager.restore(step, args=ocp.args.Composite(**items))
    for name in sorted(items.keys() - {"meta"}):  # The order is the same on all processes.
      expected, found = read["meta"][f"{name}_fingerprint"], fingerprint(read[name])
      if found != expected:
        raise ValueError(f"{name} have fingerprint {found}, {expected} was saved: damaged")
    return Restored(step, read["params"], None if rest is None else read["rest"], read["meta"])

  def set_aside_after(self, step: int) -> None:
    """Moves checkpoints newer than `step` out of the way, so that the run can write them anew."""
    newer = [other for other in self.steps() if other > step]
    distributed.on_first("set aside", lambda: self._set_aside(newer))
    self._manager.reload()

  def _set_aside(self, steps: list[int]) -> None:
    for step in steps:
      place = self._workdir / UNREADABLE
      place.mkdir(parents=True, exist_ok=True)
      target = place / str(step)
      if target.exists():
        target.rmtree()
      (self._workdir / DIRECTORY / str(step)).rename(target)
      self._report(f"moved the checkpoint of step {step} to {target}")

  def close(self) -> None:
    """Ends the background threads; call `wait` first."""
    self._manager.close()


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
