"""Checkpoints through Orbax: the one module that knows how a state lies on disk.

A checkpoint holds `params`, `rest` (optimizer and counters) and `meta` (step, data
position, config, hashes, fingerprints, and a hash over all of these). Parameters can be
read alone.
"""

import dataclasses
import functools
import json
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax import numpy as jnp

from calm_jax import distributed, errors, files, sealed_json
from calm_jax.training import failures, fingerprint, meta, metrics, reread

DIRECTORY = "checkpoints"
UNREADABLE = "checkpoints_unreadable"
# Processes may read their shares at different speeds.
PROOF_SECONDS = 1800

# Marks a problem for which no older checkpoint is taken.
_REFUSED = "refused: "

Tree = Any
Report = Callable[[str], None]

# What Orbax looks for files by, so that in a path it means other names.
GLOB = re.compile(r"[][*?\\]")


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
  found = [jnp.all(jnp.isfinite(x)) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
  return jnp.all(jnp.stack(found)) if found else jnp.bool_(True)


def all_finite(tree: Tree) -> bool:
  """Tells whether a tree holds neither NaN nor infinities, on any process's devices."""
  return bool(_all_finite(jax.tree.leaves(tree)))


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
    self._workdir = epath.Path(files.absolute(workdir))  # Orbax reads no other.
    self._last: tuple[int, dict[str, dict[str, str]]] = (0, {})
    self._report = report
    reads = keep_latest is None
    if not reads:
      require_writable_name(workdir)
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
        self._workdir / DIRECTORY, options=options, item_handlers=handlers
      )
    except Exception as error:  # A bucket's client raises errors of its own.
      reason = failures.first_line(error)
      raise errors.CalmError(f"can't open the checkpoints of {workdir}: {reason}") from error

  def steps(self) -> list[int]:
    """Returns the steps of whole checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, params: Tree, rest: Tree | None, record: dict[str, Any]) -> bool:
    """Starts saving and returns at once. Returns False, and says why, if saving fails.

    A failure of the save before this one is told here. Older checkpoints stay as
    they were; newer ones, of a run that went another way, are set aside.

    Args:
      rest: None for parameters that are never trained on.
      record: goes into its meta.
    """
    trees = {"params": params} if rest is None else {"params": params, "rest": rest}
    lines = {name: fingerprint.lines(tree) for name, tree in trees.items()}
    prints = {f"{name}_fingerprint": fingerprint.digest(found) for name, found in lines.items()}
    args = ocp.args.Composite(
      meta=ocp.args.JsonSave(sealed_json.sealed({**record, "step": step, **prints})),
      **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
    )
    self.wait()
    self._last = (step, lines)
    if max(self.steps(), default=step) > step:
      self.set_aside_after(step)

    def start() -> None:
      if not self._manager.save(step, args=args):
        raise ValueError(f"a checkpoint of step {max(self.steps(), default=step)} is in the way")

    return self._attempt(f"step {step}", start)

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
        f"saving the checkpoint of {what} failed ({failures.first_line(error)}); the last good one "
        f"is {f'step {good[-1]}' if good else 'none'}"
      )
      return False
    return True

  def prove(self) -> None:
    """Reads the last checkpoint, whose save has ended, and compares it with what was saved.

    Each process reads a share of the arrays, on the host and a few at a time.

    Raises:
      CalmError: if it does not read back as it was saved; it is set aside then.
    """
    step, lines = self._last
    try:
      for name, expected in lines.items():
        mine = sorted(expected)[distributed.index() :: distributed.count()]
        found = reread.lines(self._place(step) / name, mine)
        wrong = [leaf for leaf in mine if found.get(leaf) != expected[leaf]]
        if wrong:
          raise ValueError(f"{name} {wrong[0]} is not what was saved")
      problem = ""
    except Exception as error:
      problem = failures.first_line(error)
    told = distributed.exchange("proved", problem, PROOF_SECONDS)
    problem = next(filter(None, told), "")
    if problem:
      self.set_aside_after(step - 1)
      raise errors.CalmError(
        f"the checkpoint of step {step} was saved in {self._workdir} without an error and can't be "
        f"read back ({problem}): give a --workdir on another file system"
      )

  def _place(self, step: int) -> epath.Path:
    return self._workdir / DIRECTORY / str(step)

  def restore(self, params: Tree, rest: Tree = None, bound: str = "") -> Restored | None:
    """Returns the newest checkpoint that reads back whole, None where there is none at all.

    Where checkpoints came or went while one was read, the newest is looked for again.

    Args:
      params, rest: abstract trees; without `rest` only parameters are read.
      bound: of the workdir's seal, which a checkpoint must hold; empty for any.

    Raises:
      CalmError: if there are checkpoints and none of them can be read, or the newest is
        of another run, or can't be read now and may be whole.
    """
    steps, damaged = self._shared_steps(), []
    for step in steps_in(str(self._workdir)):
      if self._place(step).is_file():  # Orbax passes it by without a word.
        self._report(f"{self._place(step)} is a file, and no checkpoint")
    while left := [step for step in steps if step not in damaged]:
      found, problem = None, ""
      try:
        found = self._read(left[-1], params, rest, bound)
      except errors.CalmError as error:
        problem = f"{_REFUSED}{error}"
      except Exception as error:  # Damage shows as any error of Orbax or TensorStore.
        problem = failures.first_line(error)
        if failures.is_unreachable(error):
          problem = (
            f"{_REFUSED}the checkpoint of step {left[-1]} in {self._workdir} can't be read now "
            f"({problem}), which need not be damage: nothing was changed, run the same command "
            "again when it can"
          )
      problem = next(filter(None, distributed.exchange("restored", problem)), "")
      if not problem:
        return found
      found = None
      self._manager.reload()
      before, steps = steps, self._shared_steps()
      if steps != before:
        continue
      if problem.startswith(_REFUSED):
        raise errors.CalmError(problem.removeprefix(_REFUSED))
      damaged.append(left[-1])
      self._report(
        f"the checkpoint of step {left[-1]} in {self._workdir} can't be read ({problem})"
        + ("; falling back to the one before" if left[1:] else "")
      )
    if damaged:
      raise errors.CalmError(
        f"none of the checkpoints in {self._workdir / DIRECTORY} can be read (steps {steps}): put "
        "back a copy of one, or train in a new --workdir"
      )
    return None

  def _shared_steps(self) -> list[int]:
    """Returns `steps` as process 0 sees them, on all processes."""
    return json.loads(distributed.from_first("steps", json.dumps(self.steps())))

  def _read(self, step: int, params: Tree, rest: Tree, bound: str) -> Restored:
    items: dict[str, Any] = {"params": ocp.args.StandardRestore(params)}
    if rest is not None:
      items["rest"] = ocp.args.StandardRestore(rest)
    only_meta = ocp.args.Composite(meta=ocp.args.JsonRestore())
    found = self._manager.restore(step, args=only_meta)["meta"]
    meta.require(found, self._place(step), bound)
    read = self._manager.restore(step, args=ocp.args.Composite(**items))
    for name in sorted(items):  # The order is the same on all processes.
      meta.require_fingerprint(found, name, fingerprint.of(read[name]))
    return Restored(step, read["params"], None if rest is None else read["rest"], found)

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


def steps_in(workdir: str) -> list[int]:
  """Returns the steps that a workdir has folders of, oldest first.

  Raises:
    CalmError: if there is something else in the place of the checkpoints.
  """
  folder = epath.Path(workdir) / DIRECTORY
  if not folder.exists():
    return []
  if not folder.is_dir():
    raise errors.CalmError(f"{folder} is a file, where checkpoints should be: put the folder back")

  def begun_only(place: epath.Path) -> bool:
    """In a bucket a step has its name from the first file on, and a mark when it is whole."""
    return not files.is_local(place) and not (place / "commit_success.txt").exists()

  named = [place for place in folder.iterdir() if place.name.isdecimal()]
  return sorted(int(place.name) for place in named if not begun_only(place))


def require_writable_name(path: epath.PathLike) -> None:
  """Raises CalmError where no checkpoint under `path` could be read back."""
  whole = files.absolute(path)
  if GLOB.search(whole):
    raise errors.CalmError(
      f"checkpoints can't be kept in {whole}: a path that holds one of [ ] * ? \\ is read as a "
      "pattern; give another"
    )
