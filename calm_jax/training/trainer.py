"""The loop, one for all stages and any number of processes: read, step, report, evaluate, save."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from calm_jax import distributed, errors, lease, seal, workdir
from calm_jax.data import pipeline
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.training import (
  checkpoint,
  evaluation,
  feed,
  meta,
  metrics,
  profiling,
  program,
  reporter,
  resuming,
  step,
)
from calm_jax.training import guard as guard_lib

EVALUATION_BATCH = 16


@dataclasses.dataclass
class Training:
  """What a run trains, and how it is reported.

  Attributes:
    source: of its batches, for this process's rows.
    initial: parameters to start from; None for the stage's initial values. They are dropped
      once they are on the devices.
    record: goes into every checkpoint.
    flops_per_token: of training.
    metrics, figures: names of what the lines of training reports and of evaluations show.
  """

  program: program.TrainProgram
  source: pipeline.Source
  evaluate: evaluation.Evaluator
  initial: Any
  record: Mapping[str, Any]
  flops_per_token: float
  metrics: Sequence[str]
  figures: Sequence[str]


class Trainer:
  """A run of one stage in one workdir, on the mesh that is set."""

  def __init__(self, training: Training, directory: str, guard: guard_lib.Guard, held: lease.Lease):
    """Takes what is trained, and where.

    Args:
      held: the workdir's lease, which process 0 has taken.
    """
    self._guard, self._held, self._training = guard, held, training
    self._program = training.program
    self._run, self._stage = self._program.run, self._program.stage
    self._flops_per_token = training.flops_per_token
    settings = self._run.training
    self._directory = epath.Path(directory)
    self._rows = mesh_lib.own_rows(self._program.mesh, settings.batch)
    self._batches, self._evaluate = training.source, training.evaluate
    self._record = training.record
    self._checkpoints = checkpoint.Checkpoints(directory, settings.keep_latest, settings.keep_every)
    self._saved, self._saved_at = -1, time.monotonic()
    self._begun, self._taken, self._proved = 0, meta.Taken(), False

  def train(self) -> None:
    """Trains to the last step, from the newest good checkpoint if there is one.

    Raises:
      CalmError: after too many non-finite steps in a row, if the last steps or what is to
        be saved are not finite, or if the last state can't be saved.
      Interrupted: after Ctrl-C or SIGTERM on any process, once the state is saved.
    """
    guard = self._guard
    guard.stop.unsaved = False
    bound = distributed.together("seal", lambda: seal.read(str(self._directory)).bound)
    self._record = {**self._record, "seal": bound}
    state = self._restore_or_init(bound)
    start = self._begun = int(state.step)
    self._position = self._batches.get_state()
    guard.ledger.part("restore or init")
    writer = metrics.Writer(self._directory / workdir.METRICS, self._run.training.steps, start)
    batches = feed.Feed(
      self._batches, self._program.mesh, self._run.training.batch, self._rows,
      self._run.data.reuse_batch,
    )  # fmt: skip
    try:
      distributed.on_first("ledger", lambda: guard.ledger.open(self._directory, start))
      self._loop(state, start, writer, batches)
    except resuming.NonFinite as error:
      rate = self._run.optimizer.learning_rate
      advice = resuming.step_back(self._checkpoints, error, rate)
      raise errors.CalmError(f"{error}; {advice}") from error
    except errors.CalmError as error:
      self._checkpoints.wait()
      good = self._checkpoints.steps()
      where = f"step {good[-1]}" if good else "none"
      raise errors.CalmError(f"{error}; the last good checkpoint is {where}") from error
    finally:
      batches.close()
      writer.close()
      self._checkpoints.close()
    metrics.show(f"saved step {self._saved} in {self._directory}")

  def _restore_or_init(self, bound: str) -> step.TrainState:
    restored = self._checkpoints.restore(*step.parts(self._program.state), bound)
    if restored is None:
      params, self._training.initial = self._training.initial, None
      return self._program.initial(params)
    self._taken = meta.Taken.of(restored.meta["data"], restored.step)
    self._checkpoints.set_aside_after(restored.step)
    self._batches.set_state(restored.meta["data"])
    self._saved = restored.step
    metrics.show(f"going on after step {restored.step}")
    return step.TrainState(params=restored.params, **restored.rest)

  def _loop(
    self, state: step.TrainState, start: int, writer: metrics.Writer, batches: feed.Feed
  ) -> None:
    settings, guard = self._run.training, self._guard
    stop, ledger = guard.stop, guard.ledger
    if start and self._evaluation_is_due(start) and not writer.has("evaluation", start):
      self._write_evaluation(start, state, writer)  # The run was cut before it came to that.
      ledger.part("evaluation made up")
    if start >= settings.steps:
      return
    take = self._program.compiled_step()
    ledger.part("compile")
    if settings.eval_every:  # Now, so that a signal never has to wait for the compiler.
      self._evaluate.compile(self._program.state.params)
      ledger.part("compile evaluation")
    report = reporter.Reporter(
      self._run, writer, self._flops_per_token, start, self._training.metrics
    )
    profile = profiling.Window(self._run.profile, self._directory)
    positions, done, agreed = {start: self._position}, start, frozenset()
    while done < settings.steps and "stop" not in agreed:
      with ledger.timed("data_wait", report.wait_for_data):
        fed = batches.take(lambda: stop.signal is None)
      raised = self._raised(fed is None)
      stop.unsaved = True
      arrays = self._program.blank_batch() if fed is None else fed.arrays
      profile.before_step()
      state, figures = take(state, self._stage.frozen, arrays, self._program.place_signals(raised))
      done += 1
      if distributed.is_first():  # Before figures are written.
        self._held.require_held()
      agreed = report.push(done, figures, self._rows[:0] if fed is None else fed.index)
      if distributed.count() == 1:  # It need not wait to hear of itself.
        agreed = raised | self._raised(no_batch=False)
      if done == start + 1:
        jax.block_until_ready(figures)
        metrics.show(ledger.first_step())
      profile.after_step(figures)
      guard.watchdog.begin("step")
      if fed is not None:
        positions[done] = fed.position
      stopping = "stop" in agreed
      last = done == settings.steps or stopping
      save = last or "save" in agreed or done % settings.checkpoint_every == 0
      evaluate = self._evaluation_is_due(done) and not stopping
      if save or evaluate:
        report.flush()  # What is scored or saved is known to be good.
        done -= report.voids
        position = positions[done]
        skipping = report.skipped_in_a_row
        if save and not skipping:
          with ledger.timed("shutdown" if last else "save", report.pause):
            self._save(done, state, position, wait=last)
        elif save:
          self._leave_unsaved(done, skipping, at_end=last and not stopping)
        if evaluate:
          with ledger.timed("evaluation", report.pause):
            agreed = self._write_evaluation(done, state, writer)
          if "stop" in agreed and not skipping:
            with ledger.timed("shutdown", report.pause):
              self._save(done, state, position, wait=True)
        positions = {done: position}
      ledger.write(done, now=last or "stop" in agreed)
    profile.close()
    if "stop" in agreed:
      raise self._interrupted(done)

  @property
  def _examples_a_step(self) -> int:
    """By how much a step moves the position of the data."""
    return 0 if self._run.data.reuse_batch else self._run.training.batch

  def _raised(self, no_batch: bool) -> frozenset[str]:
    """Returns what this process tells the others with the next step."""
    minutes = self._run.training.checkpoint_minutes
    due = bool(minutes) and time.monotonic() - self._saved_at > 60 * minutes
    told = {
      "stop": self._guard.stop.signal is not None,
      "save": due and distributed.is_first(),
      "void": no_batch,
    }
    return frozenset(name for name, raised in told.items() if raised)

  def _interrupted(self, done: int) -> errors.Interrupted:
    stopped = self._guard.stop
    name = stopped.signal.name if stopped.signal else "stopped as another process was"
    message = f"{name}: saved step {done}; the same command goes on from it"
    if self._saved != done:  # Its last steps were skipped.
      self._checkpoints.wait()
      from_step = max(self._checkpoints.steps(), default=0)
      message = f"{name}: the same command goes on from step {from_step}"
    metrics.show(message)
    return errors.Interrupted(message, stopped.code)

  def _evaluation_is_due(self, done: int) -> bool:
    settings = self._run.training
    return bool(settings.eval_every) and (done == settings.steps or done % settings.eval_every == 0)

  def _write_evaluation(
    self, done: int, state: step.TrainState, writer: metrics.Writer
  ) -> frozenset[str]:
    """Returns what was agreed meanwhile: `stop` where the evaluation was given up for one."""
    run, guard = self._run, self._guard

    def stopped() -> bool:
      guard.watchdog.begin("step")
      return guard.stop.signal is not None

    figures = self._evaluate(state.params, stopped)
    if figures is None:
      return frozenset({"stop"})
    tokens = done * run.data.context * run.training.batch
    figures |= {"flops": tokens * self._flops_per_token}
    writer.write("evaluation", done, figures, self._training.figures)
    return frozenset()

  def _leave_unsaved(self, done: int, skipping: int, at_end: bool) -> None:
    """Says that a state after skipped steps is not saved: nothing may come of it any more.

    Raises:
      NonFinite: at the end of the run.
    """
    told = f"step {done} is not saved, as the {skipping} before it were skipped"
    if at_end:
      raise resuming.NonFinite(told, done - skipping)
    self._saved_at = time.monotonic()
    metrics.show(told)

  def _save(
    self, done: int, state: step.TrainState, position: Mapping[str, Any], wait: bool
  ) -> None:
    self._guard.watchdog.begin("shutdown" if wait else "step")
    saved = True
    if done != self._saved:
      distributed.on_first("lease held", self._held.require_held)
      params, rest = step.parts(state)
      if not checkpoint.all_finite((params, rest)):
        raise resuming.NonFinite(f"the state after step {done} holds values not finite", done)
      taken = self._taken.after(done - self._begun, self._examples_a_step)
      data = {**position, "taken": taken.to_json()}
      saved = self._checkpoints.save(done, params, rest, {**self._record, "data": data})
      self._saved_at = time.monotonic()
      if not self._proved:
        saved = distributed.everywhere("saved", self._checkpoints.wait() and saved)
        if saved:
          self._prove(done)
      if saved:
        self._saved = done
    if wait and not (self._checkpoints.wait() and saved):
      raise errors.CalmError(
        f"step {done} could not be saved in {self._directory}: make room there and run the same "
        "command again"
      )
    self._guard.stop.unsaved = not wait

  def _prove(self, done: int) -> None:
    """Reads the first checkpoint of this attempt back before it counts as saved."""
    self._checkpoints.prove()
    self._proved = True
    distributed.on_first("proved", lambda: self._guard.ledger.saved(done))
