"""The training loop of all stages and processes: read, step, report, evaluate, save."""

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
  """The inputs of a trainer.

  Attributes:
    program: the train step.
    source: source of batches, for this process's rows.
    evaluate: scores held-out text.
    initial: parameters to start from; None for the stage's initial values. The trainer drops
      them once they are on the devices.
    record: settings and origin, stored in every checkpoint.
    flops_per_token: training FLOPs per token.
    metrics, figures: names of the values that console lines of training reports and of
      evaluations show.
  """

  program: program.TrainProgram
  source: pipeline.Source
  evaluate: evaluation.Evaluator
  initial: Any
  record: Mapping[str, Any]
  flops_per_token: float
  metrics: Sequence[str]
  figures: Sequence[str]


@dataclasses.dataclass
class _Progress:
  """The position of the training loop.

  Attributes:
    done: the last step that was dispatched.
    positions: data position after each step since the last flush.
    agreed: signals that the processes agreed on with the last step.
    is_running: whether a step of this attempt has ended.
  """

  state: step.TrainState
  done: int
  positions: dict[int, Mapping[str, Any]]
  agreed: frozenset[str] = frozenset()
  is_running: bool = False

  @property
  def position(self) -> Mapping[str, Any]:
    """The position of the data after the last step."""
    return self.positions[self.done]

  def drop_voids(self, voids: int) -> None:
    """Takes back the number of void steps, which do not count; forgets earlier positions."""
    self.done -= voids
    self.positions = {self.done: self.position}


class Trainer:
  """Trains one stage in one workdir, on the mesh that is set."""

  def __init__(
    self, training: Training, directory: str, guard: guard_lib.Guard, workdir_lease: lease.Lease
  ):
    """Prepares training in the workdir `directory`.

    Args:
      workdir_lease: the workdir's lease, which process 0 holds.
    """
    self._guard, self._lease, self._training = guard, workdir_lease, training
    self._program = training.program
    self._run, self._stage = self._program.run, self._program.stage
    self._flops_per_token = training.flops_per_token
    settings = self._run.training
    self._directory = epath.Path(directory)
    self._rows = mesh_lib.own_rows(self._program.mesh, settings.batch)
    self._batches, self._evaluate = training.source, training.evaluate
    self._record = training.record
    self._checkpoints = checkpoint.Checkpoints(directory, settings.keep_latest, settings.keep_every)
    self._saved_step, self._saved_at = -1, time.monotonic()
    self._start, self._taken, self._is_proved = 0, meta.Taken(), False

  def train(self) -> None:
    """Trains to the last step, from the newest good checkpoint if there is one.

    Raises:
      CalmError: after too many non-finite steps in a row, if the last steps or a state to be
        saved are not finite, or if the last state can't be saved.
      Interrupted: after Ctrl-C or SIGTERM on any process, once the state is saved.
    """
    guard = self._guard
    guard.stop.unsaved = False
    bound = distributed.together("seal", lambda: seal.read(str(self._directory)).bound)
    self._record = {**self._record, "seal": bound}
    state = self._restore_or_init(bound)
    start = self._start = int(state.step)
    self._position = self._batches.get_state()
    guard.ledger.part("restore or init")
    writer = metrics.Writer(self._directory / workdir.METRICS, self._run.training.steps, start)
    batches = feed.Feed(
      self._batches,
      self._program.mesh,
      self._run.training.batch,
      self._rows,
      self._run.data.reuse_batch,
    )
    try:
      distributed.on_first("ledger", lambda: guard.ledger.open(self._directory, start))
      self._loop(state, start, writer, batches)
    except resuming.NonFinite as error:
      rate = self._run.optimizer.learning_rate
      advice = resuming.step_back(self._checkpoints, error, rate)
      raise errors.CalmError(f"{error}; {advice}") from error
    except errors.CalmError as error:
      self._checkpoints.wait()
      steps = self._checkpoints.steps()
      last_good = f"step {steps[-1]}" if steps else "none"
      raise errors.CalmError(f"{error}; the last good checkpoint is {last_good}") from error
    finally:
      batches.close()
      writer.close()
      self._checkpoints.close()
    metrics.show(f"saved step {self._saved_step} in {self._directory}")

  def _restore_or_init(self, bound: str) -> step.TrainState:
    restored = self._checkpoints.restore(*step.parts(self._program.state), bound)
    if restored is None:
      params, self._training.initial = self._training.initial, None
      return self._program.initial(params)
    self._taken = meta.Taken.of(restored.meta["data"], restored.step)
    self._checkpoints.set_aside_after(restored.step)
    self._batches.set_state(restored.meta["data"])
    self._saved_step = restored.step
    metrics.show(f"resuming after step {restored.step}")
    return step.TrainState(params=restored.params, **restored.rest)

  def _loop(
    self, state: step.TrainState, start: int, writer: metrics.Writer, batches: feed.Feed
  ) -> None:
    settings, ledger = self._run.training, self._guard.ledger
    if start and self._evaluation_is_due(start) and not writer.has("evaluation", start):
      self._write_evaluation(start, state, writer)  # The run was interrupted before it.
      ledger.part("missed evaluation")
    if start >= settings.steps:
      return
    take_step = self._compile()
    report = reporter.Reporter(
      self._run, writer, self._flops_per_token, start, self._training.metrics
    )
    profile = profiling.Window(self._run.profile, self._directory)
    progress = _Progress(state, start, {start: self._position})
    while progress.done < settings.steps and "stop" not in progress.agreed:
      self._advance(progress, take_step, batches, report, profile)
      if progress.done == start + 1:
        metrics.show(ledger.first_step())
      is_stopping = "stop" in progress.agreed
      is_last = progress.done == settings.steps or is_stopping
      at_checkpoint = progress.done % settings.checkpoint_every == 0
      save = is_last or "save" in progress.agreed or at_checkpoint
      evaluate = self._evaluation_is_due(progress.done) and not is_stopping
      if save or evaluate:
        report.flush()  # Raises if the state to be scored or saved is not finite.
        progress.drop_voids(report.voids)
        num_skipped = report.skipped_in_a_row
        if save and num_skipped:
          self._leave_unsaved(progress.done, num_skipped, at_end=is_last and not is_stopping)
        elif save:
          self._save_timed("shutdown" if is_last else "save", progress, report)
        if evaluate:
          self._evaluate_timed(progress, report, writer)
      ledger.write(progress.done, now=is_last or "stop" in progress.agreed)
    profile.close()
    if "stop" in progress.agreed:
      raise self._interrupted(progress.done)

  def _compile(self) -> jax.stages.Compiled:
    """Returns the compiled step, and compiles the evaluation."""
    take_step = self._program.compiled_step()
    self._guard.ledger.part("compile")
    if self._run.training.eval_every:  # Compiled here, so that a later signal need not wait for it.
      self._evaluate.compile(self._program.state.params)
      self._guard.ledger.part("compile evaluation")
    return take_step

  def _advance(
    self,
    progress: _Progress,
    take_step: jax.stages.Compiled,
    batches: feed.Feed,
    report: reporter.Reporter,
    profile: profiling.Window,
  ) -> None:
    """Dispatches one step, and reads the figures of the one before it."""
    stop = self._guard.stop
    with self._guard.ledger.timed("data_wait", report.wait_for_data):
      batch = batches.take(lambda: stop.signal is None)
    raised = self._raised_signals(batch is None)
    stop.unsaved = True
    arrays = self._program.blank_batch() if batch is None else batch.arrays
    signals = self._program.place_signals(raised)
    profile.before_step()
    progress.state, figures = take_step(progress.state, self._stage.frozen, arrays, signals)
    progress.done += 1
    if distributed.is_first():  # Checked before figures are written.
      self._lease.require_held()
    index = self._rows[:0] if batch is None else batch.index
    progress.agreed = report.push(progress.done, figures, index)
    if distributed.count() == 1:  # A single process need not wait for the exchange.
      progress.agreed = raised | self._raised_signals(no_batch=False)
    if not progress.is_running:  # The first step's time is reported apart.
      jax.block_until_ready(figures)
      progress.is_running = True
    profile.after_step(figures)
    self._guard.watchdog.begin("step")
    if batch is not None:
      progress.positions[progress.done] = batch.position

  def _save_timed(self, part: str, progress: _Progress, report: reporter.Reporter) -> None:
    """Saves the state and records the time as `part`; "shutdown" waits for the end of the save."""
    with self._guard.ledger.timed(part, report.pause):
      self._save(progress.done, progress.state, progress.position, wait=part == "shutdown")

  def _evaluate_timed(
    self, progress: _Progress, report: reporter.Reporter, writer: metrics.Writer
  ) -> None:
    """Writes an evaluation; if a signal ended it early, saves the state."""
    with self._guard.ledger.timed("evaluation", report.pause):
      progress.agreed = self._write_evaluation(progress.done, progress.state, writer)
    if "stop" in progress.agreed and not report.skipped_in_a_row:
      self._save_timed("shutdown", progress, report)

  @property
  def _examples_per_step(self) -> int:
    """Number of examples by which a step advances the data."""
    return 0 if self._run.data.reuse_batch else self._run.training.batch

  def _raised_signals(self, no_batch: bool) -> frozenset[str]:
    """Returns the signals that this process sends to the others with the next step."""
    minutes = self._run.training.checkpoint_minutes
    is_save_due = bool(minutes) and time.monotonic() - self._saved_at > 60 * minutes
    signals = {
      "stop": self._guard.stop.signal is not None,
      "save": is_save_due and distributed.is_first(),
      "void": no_batch,
    }
    return frozenset(name for name, is_raised in signals.items() if is_raised)

  def _interrupted(self, done: int) -> errors.Interrupted:
    """Returns the exception for a stopped run, after printing its message."""
    stop = self._guard.stop
    name = stop.signal.name if stop.signal else "stopped with another process"
    message = f"{name}: saved step {done}; the same command resumes from it"
    if self._saved_step != done:  # The last steps were skipped.
      self._checkpoints.wait()
      newest = max(self._checkpoints.steps(), default=0)
      message = f"{name}: the same command resumes from step {newest}"
    metrics.show(message)
    return errors.Interrupted(message, stop.code)

  def _evaluation_is_due(self, done: int) -> bool:
    settings = self._run.training
    return bool(settings.eval_every) and (done == settings.steps or done % settings.eval_every == 0)

  def _write_evaluation(
    self, done: int, state: step.TrainState, writer: metrics.Writer
  ) -> frozenset[str]:
    """Evaluates and returns the signals agreed on: `stop` if one ended the evaluation early."""
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

  def _leave_unsaved(self, done: int, num_skipped: int, at_end: bool) -> None:
    """Reports that a state after skipped steps is not saved: it may never train again.

    Raises:
      NonFinite: at the end of the run.
    """
    message = f"step {done} is not saved, as the {num_skipped} before it were skipped"
    if at_end:
      raise resuming.NonFinite(message, done - num_skipped)
    self._saved_at = time.monotonic()
    metrics.show(message)

  def _save(
    self, done: int, state: step.TrainState, position: Mapping[str, Any], wait: bool
  ) -> None:
    """Saves the state after step `done`; with `wait`, returns once it is on disk."""
    self._guard.watchdog.begin("shutdown" if wait else "step")
    is_saved = True
    if done != self._saved_step:
      distributed.on_first("lease held", self._lease.require_held)
      params, rest = step.parts(state)
      if not checkpoint.all_finite((params, rest)):
        raise resuming.NonFinite(f"the state after step {done} holds non-finite values", done)
      taken = self._taken.after(done - self._start, self._examples_per_step)
      data = {**position, "taken": taken.to_json()}
      is_saved = self._checkpoints.save(done, params, rest, {**self._record, "data": data})
      self._saved_at = time.monotonic()
      if not self._is_proved:
        is_saved = distributed.everywhere("saved", self._checkpoints.wait() and is_saved)
        if is_saved:
          self._prove(done)
      if is_saved:
        self._saved_step = done
    if wait and not (self._checkpoints.wait() and is_saved):
      raise errors.CalmError(
        f"step {done} could not be saved in {self._directory}: free space there and run the same "
        "command again"
      )
    self._guard.stop.unsaved = not wait

  def _prove(self, done: int) -> None:
    """Reads the first checkpoint of this attempt back before it counts as saved."""
    self._checkpoints.prove()
    self._is_proved = True
    distributed.on_first("proved", lambda: self._guard.ledger.saved(done))
