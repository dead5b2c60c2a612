"""Train state <-> checkpoints, by Orbax: the one module that knows their layout on disk.

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
# Timeout of `prove`: processes may read their shares at different speeds.
PROOF_SECONDS = 1800

# Marks a problem for which no older checkpoint is used.
_REFUSED = "refused: "

Tree = Any
Report = Callable[[str], None]

# Characters that Orbax reads as a pattern when it looks for files.
GLOB = re.compile(r"[][*?\\]")


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
  finite = [jnp.all(jnp.isfinite(x)) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
  return jnp.all(jnp.stack(finite)) if finite else jnp.bool_(True)


def all_finite(tree: Tree) -> bool:
  """Returns whether all values of a tree are finite, on the devices of all processes."""
  return bool(_all_finite(jax.tree.leaves(tree)))


@functools.cache
def _ignore_stragglers() -> None:
  """Silences reads and writes that are still in progress when Orbax gives up on another.

  Each would print that its event loop is closed, that it was never awaited, or an error
  that has already been reported.
  """
  previous = sys.unraisablehook
  warnings.filterwarnings("ignore", message="coroutine .* was never awaited")

  def hook(unraisable):
    code = getattr(unraisable.object, "cr_code", None)  # Of the coroutine.
    is_late = code is not None and "orbax" in code.co_filename
    if not is_late and str(unraisable.exc_value) != "Event loop is closed":
      previous(unraisable)

  sys.unraisablehook = hook


def few_gb(tree: Tree) -> int:
  """Returns the smallest `concurrent_gb` that fits every leaf, for use when memory is short."""
  return 1 + max(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) // 2**30


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint that was read. `rest` is None if only the parameters were requested."""

  step: int
  params: Tree
  rest: Tree
  meta: dict[str, Any]


class Checkpoints:
  """The checkpoints of one workdir, saved in the background, completely or not at all."""

  def __init__(
    self,
    workdir: str,
    keep_latest: int | None = None,
    keep_every: int = 0,
    report: Report = metrics.show,
    concurrent_gb: int = 96,
  ):
    """Opens checkpoints for reading, or for writing if `keep_latest` is given.

    A reader changes nothing, so that a run can be inspected while it trains.

    Args:
      keep_latest: number of the latest checkpoints that are kept.
      keep_every: a checkpoint is also kept if its step is a multiple of this; 0 for none.
      concurrent_gb: gigabytes that may be in transfer at once, in addition to the state;
        see `few_gb`.

    Raises:
      CalmError: if they can't be written there.
    """
    _ignore_stragglers()
    self._workdir = epath.Path(files.absolute(workdir))  # Orbax reads absolute paths only.
    self._last_save: tuple[int, dict[str, dict[str, str]]] = (0, {})
    self._report = report
    is_reader = keep_latest is None
    if not is_reader:
      require_writable_name(workdir)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep_latest,
      keep_period=keep_every or None,
      cleanup_tmp_directories=not is_reader,
      create=not is_reader,
      read_only=is_reader,
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
    """Returns the steps of complete checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, params: Tree, rest: Tree | None, record: dict[str, Any]) -> bool:
    """Starts saving, and returns False, with a report of the reason, if that fails.

    A failure of the previous save is reported too. Older checkpoints stay unchanged; newer
    ones, left by an earlier course of the run, are set aside.

    Args:
      rest: None for parameters that are not trained further.
      record: is stored in `meta`.
    """
    trees = {"params": params} if rest is None else {"params": params, "rest": rest}
    lines = {name: fingerprint.lines(tree) for name, tree in trees.items()}
    prints = {f"{name}_fingerprint": fingerprint.digest(x) for name, x in lines.items()}
    args = ocp.args.Composite(
      meta=ocp.args.JsonSave(sealed_json.sealed({**record, "step": step, **prints})),
      **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
    )
    self.wait()
    self._last_save = (step, lines)
    if max(self.steps(), default=step) > step:
      self.set_aside_after(step)

    def start() -> None:
      if not self._manager.save(step, args=args):
        raise ValueError(f"a checkpoint of step {max(self.steps(), default=step)} is in the way")

    return self._attempt(f"step {step}", start)

  def wait(self) -> bool:
    """Waits for the save in progress; returns False, with a report, if it failed."""
    return self._attempt("the last step", self._manager.wait_until_finished)

  def _attempt(self, what: str, action: Callable[[], Any]) -> bool:
    try:
      action()
    except Exception as error:  # Orbax passes on any error of the file system.
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

    Each process reads a share of the arrays, on the host, a few at a time.

    Raises:
      CalmError: if it does not read back as it was saved; it is then set aside.
    """
    step, lines = self._last_save
    try:
      for name, expected in lines.items():
        share = sorted(expected)[distributed.index() :: distributed.count()]
        read = reread.lines(self._place(step) / name, share)
        changed = [leaf for leaf in share if read.get(leaf) != expected[leaf]]
        if changed:
          raise ValueError(f"{name} {changed[0]} is not what was saved")
      problem = ""
    except Exception as error:
      problem = failures.first_line(error)
    problem = next(filter(None, distributed.exchange("proved", problem, PROOF_SECONDS)), "")
    if problem:
      self.set_aside_after(step - 1)
      raise errors.CalmError(
        f"the checkpoint of step {step} was saved in {self._workdir} without an error and can't be "
        f"read back ({problem}): give a --workdir on another file system"
      )

  def _place(self, step: int) -> epath.Path:
    return self._workdir / DIRECTORY / str(step)

  def restore(self, params: Tree, rest: Tree = None, bound: str = "") -> Restored | None:
    """Returns the newest checkpoint that is intact; None if there are no checkpoints.

    A damaged checkpoint is reported and the previous one is used. If checkpoints were
    added or removed while one was read, the search starts again.

    Args:
      params, rest: abstract trees; without `rest`, only parameters are read.
      bound: `bound` of the workdir's seal, which a checkpoint must hold; empty for any.

    Raises:
      CalmError: if there are checkpoints and all are damaged, or if the newest belongs to
        another run, or can't be read now and may be intact.
    """
    steps, damaged = self._shared_steps(), []
    for step in steps_in(str(self._workdir)):
      if self._place(step).is_file():  # Orbax ignores it silently.
        self._report(f"{self._place(step)} is a file, not a checkpoint")
    while candidates := [step for step in steps if step not in damaged]:
      restored, problem = None, ""
      try:
        restored = self._read(candidates[-1], params, rest, bound)
      except errors.CalmError as error:
        problem = f"{_REFUSED}{error}"
      except Exception as error:  # Damage can raise any error in Orbax or TensorStore.
        problem = failures.first_line(error)
        if failures.is_unreachable(error):
          problem = (
            f"{_REFUSED}the checkpoint of step {candidates[-1]} in {self._workdir} can't be read "
            f"now ({problem}), which need not be damage: nothing was changed, run the same command "
            "again when it can"
          )
      problem = next(filter(None, distributed.exchange("restored", problem)), "")
      if not problem:
        return restored
      restored = None
      self._manager.reload()
      before, steps = steps, self._shared_steps()
      if steps != before:
        continue
      if problem.startswith(_REFUSED):
        raise errors.CalmError(problem.removeprefix(_REFUSED))
      damaged.append(candidates[-1])
      self._report(
        f"the checkpoint of step {candidates[-1]} in {self._workdir} can't be read ({problem})"
        + ("; falling back to the one before" if candidates[1:] else "")
      )
    if damaged:
      raise errors.CalmError(
        f"none of the checkpoints in {self._workdir / DIRECTORY} can be read (steps {steps}): put "
        "back a copy of one, or train in a new --workdir"
      )
    return None

  def _shared_steps(self) -> list[int]:
    """Returns `steps` of process 0, on all processes."""
    return json.loads(distributed.from_first("steps", json.dumps(self.steps())))

  def _read(self, step: int, params: Tree, rest: Tree, bound: str) -> Restored:
    items: dict[str, Any] = {"params": ocp.args.StandardRestore(params)}
    if rest is not None:
      items["rest"] = ocp.args.StandardRestore(rest)
    only_meta = ocp.args.Composite(meta=ocp.args.JsonRestore())
    values = self._manager.restore(step, args=only_meta)["meta"]
    meta.require(values, self._place(step), bound)
    read = self._manager.restore(step, args=ocp.args.Composite(**items))
    for name in sorted(items):  # In the same order on all processes.
      meta.require_fingerprint(values, name, fingerprint.of(read[name]))
    return Restored(step, read["params"], None if rest is None else read["rest"], values)

  def set_aside_after(self, step: int) -> None:
    """Sets checkpoints newer than `step` aside, so that the run can write them again."""
    newer = [saved for saved in self.steps() if saved > step]
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
    """Stops the background threads; call `wait` first."""
    self._manager.close()


def steps_in(workdir: str) -> list[int]:
  """Returns the steps for which a workdir has folders, oldest first.

  Raises:
    CalmError: if the folder of checkpoints is a file.
  """
  folder = epath.Path(workdir) / DIRECTORY
  if not folder.exists():
    return []
  if not folder.is_dir():
    raise errors.CalmError(f"{folder} is a file, where checkpoints should be: put the folder back")

  def is_incomplete(place: epath.Path) -> bool:
    """In a bucket, a step's folder exists from its first file on; a mark file completes it."""
    return not files.is_local(place) and not (place / "commit_success.txt").exists()

  paths = [path for path in folder.iterdir() if path.name.isdecimal()]
  return sorted(int(path.name) for path in paths if not is_incomplete(path))


def require_writable_name(path: epath.PathLike) -> None:
  """Raises CalmError if no checkpoint under `path` could be read back."""
  absolute = files.absolute(path)
  if GLOB.search(absolute):
    raise errors.CalmError(
      f"checkpoints can't be kept in {absolute}: a path that holds one of [ ] * ? \\ is read as a "
      "pattern; give another"
    )
