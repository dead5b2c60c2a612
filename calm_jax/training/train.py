"""The loop, one for all stages: read, step, report, evaluate, save."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from calm_jax import config, errors, workdir
from calm_jax.data import pipeline
from calm_jax.data import store as store_lib
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.training import checkpoint, evaluation, metrics, program, reporter, stages, step

EVALUATION_BATCH = 16
SHOWN = (
  "token_accuracy", "patch_accuracy", "brier_lm", "brier_lm_stderr", "energy", "conditioning_gap",
)  # fmt: skip


class Interrupted(KeyboardInterrupt):
  """Ctrl-C or SIGTERM, after the state was saved."""


class _Stop:
  """Turns the first SIGINT or SIGTERM into a flag; the second acts as usual."""

  def __init__(self):
    self.signal = ""
    self._previous: dict[int, Any] = {}

  def __enter__(self):
    for number in (signal.SIGINT, signal.SIGTERM):
      self._previous[number] = signal.signal(number, self._note)
    return self

  def _note(self, number, _):
    self.signal = signal.Signals(number).name
    self.__exit__()

  def __exit__(self, *_):
    while self._previous:
      signal.signal(*self._previous.popitem())


@contextlib.contextmanager
def _timed(book: Callable[[float], None]) -> Iterator[None]:
  start = time.perf_counter()
  yield
  book(time.perf_counter() - start)


class Trainer:
  """A run of one stage in one workdir."""

  def __init__(
    self,
    run: config.Run,
    stage: stages.Stage,
    store: store_lib.TokenStore,
    directory: str,
    flops_per_token: float,
    record: Mapping[str, Any],
    initial: Any = None,
  ):
    """Takes the parts of a run.

    Args:
      record: goes into every checkpoint.
      initial: parameters to start from, by default the stage's initial values.
    """
    self._initial = initial
    self._run, self._stage, self._flops_per_token = run, stage, flops_per_token
    settings, context = run.training, run.data.context
    self._directory = epath.Path(directory)
    self._program = program.Program(run, stage, mesh_lib.current())
    self._rows = mesh_lib.own_rows(self._program.mesh, settings.batch)
    self._batches = pipeline.TrainingBatches(
      store, context, settings.batch, settings.seed, self._rows
    )
    self._evaluate = evaluation.Evaluator(
      stage, store, context, min(EVALUATION_BATCH, settings.eval_blocks), settings.eval_blocks, 0
    )
    self._record = record
    self._checkpoints = checkpoint.Checkpoints(directory, settings.keep_latest, settings.keep_every)

  def train(self) -> None:
    """Trains to the last step, from the newest good checkpoint if there is one.

    Raises:
      CalmError: after too many non-finite steps in a row, or if the last state
        can't be saved.
      Interrupted: after Ctrl-C or SIGTERM, once the state is saved.
    """
    state = self._restore_or_init()
    start, steps = int(state.step), self._run.training.steps
    writer = metrics.Writer(self._directory / workdir.METRICS, steps, start)
    try:
      if start and self._evaluation_is_due(start) and not writer.has("evaluation", start):
        self._write_evaluation(start, state, writer)  # The run was cut before it came to that.
      with _Stop() as stop:
        self._loop(state, start, writer, stop)
    except errors.CalmError as error:
      self._checkpoints.wait()
      good = self._checkpoints.steps()
      where = f"step {good[-1]}" if good else "none"
      raise errors.CalmError(f"{error}; the last good checkpoint is {where}") from error
    finally:
      writer.close()
      self._checkpoints.close()

  def _restore_or_init(self) -> step.TrainState:
    restored = self._checkpoints.restore(*step.parts(self._program.state))
    if restored is None:
      params, self._initial = self._initial, None  # Held no longer than need be.
      return self._program.initial(params)
    self._checkpoints.set_aside_after(restored.step)
    self._batches.set_state(restored.meta["data"])
    metrics.show(f"going on after step {restored.step}")
    return step.TrainState(params=restored.params, **restored.rest)

  def _loop(self, state: step.TrainState, start: int, writer: metrics.Writer, stop: _Stop) -> None:
    settings = self._run.training
    report = reporter.Reporter(self._run, writer, self._flops_per_token, start)
    take: Callable[..., Any] | None = None
    for done in range(start + 1, settings.steps + 1):
      with _timed(report.wait_for_data):
        read = next(self._batches)
      if take is None:
        with _timed(report.pause):
          take = self._program.compiled_step()
      batch = mesh_lib.place_rows(self._program.mesh, read, self._rows, settings.batch)
      state, figures = take(state, self._stage.frozen, batch, self._program.place_signals())
      report.push(done, figures, read["index"])
      stopping = stop.signal  # A signal that comes later is heeded after the next step.
      last = done == settings.steps or bool(stopping)
      evaluate = self._evaluation_is_due(done) and not stopping
      save = last or done % settings.checkpoint_every == 0
      if evaluate or save:
        report.flush()  # What is scored or saved is known to be good.
        with _timed(report.pause):
          if save:
            self._save(done, state, wait=last)
          if evaluate:
            self._write_evaluation(done, state, writer)
      if stopping:
        metrics.show(f"{stopping}: saved step {done}; the same command goes on from it")
        raise Interrupted()

  def _evaluation_is_due(self, done: int) -> bool:
    settings = self._run.training
    return bool(settings.eval_every) and (done == settings.steps or done % settings.eval_every == 0)

  def _write_evaluation(self, done: int, state: step.TrainState, writer: metrics.Writer) -> None:
    run = self._run
    tokens = done * run.data.context * run.training.batch
    figures = self._evaluate(state.params) | {"flops": tokens * self._flops_per_token}
    writer.write("evaluation", done, figures, SHOWN)

  def _save(self, done: int, state: step.TrainState, wait: bool) -> None:
    params, rest = step.parts(state)
    meta = {**self._record, "data": self._batches.get_state()}
    saved = self._checkpoints.save(done, params, rest, meta)
    if wait and not (self._checkpoints.wait() and saved):
      raise errors.CalmError(
        f"step {done} could not be saved in {self._directory}: make room there and run the same "
        "command again"
      )
