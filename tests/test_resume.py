"""Claims about interrupted runs: resumed, they equal the uninterrupted run bit for bit."""

import dataclasses
import json
import pathlib
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from calm_jax import config, errors, workdir
from calm_jax.data import pipeline
from calm_jax.running import loading, train
from calm_jax.stages import calm as calm_stage
from calm_jax.stages import tempered as tempered_stage
from calm_jax.training import evaluation, reporter

STAGES = ("autoencoder", "calm")


@pytest.fixture(params=STAGES)
def run_and_reference(request: pytest.FixtureRequest) -> tuple[config.Run, pathlib.Path]:
  """The settings of a run, and the workdir of its uninterrupted training."""
  stage = request.param
  return request.getfixturevalue(f"{stage}_run"), request.getfixturevalue(f"trained_{stage}")


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
  """Calls `action` after the loop has dispatched a step."""
  push = reporter.Reporter.push

  def pushed(self, done, *others):
    push(self, done, *others)
    if done == step:
      action()

  monkeypatch.setattr(reporter.Reporter, "push", pushed)


def weights(directory: pathlib.Path) -> dict[str, np.ndarray]:
  trained = loading.load(str(directory))
  return {"step": np.int32(trained.step)} | {
    "/".join(str(key) for key in path): np.asarray(leaf)
    for path, leaf in jax.tree.leaves_with_path(trained.params)
  }


def figures(directory: pathlib.Path, kind: str) -> list[dict]:
  """Returns the reports of a kind without the figures that depend on the clock."""
  timed = {"time", "seconds", "data_wait_share", "tokens_per_second", "patches_per_second"}
  records = map(json.loads, (directory / workdir.METRICS).read_text().splitlines())
  return [
    {name: value for name, value in record.items() if name not in timed}
    for record in records
    if record["kind"] == kind
  ]


def assert_same(a: pathlib.Path, b: pathlib.Path) -> None:
  actual, expected = weights(a), weights(b)
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value, err_msg=name)
  for kind in ("train", "evaluation"):
    assert figures(a, kind) == figures(b, kind)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_and_resumes_to_the_same_result(
  run_and_reference, number: signal.Signals, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  run, reference = run_and_reference
  with monkeypatch.context() as patch:
    at_step(patch, 3, lambda: signal.raise_signal(number))
    with pytest.raises(errors.Interrupted):
      train.train_run(run, str(tmp_path))
  assert weights(tmp_path)["step"] == 3
  train.train_run(run, str(tmp_path))
  assert_same(tmp_path, reference)


def test_a_stopped_tempered_head_resumes_to_the_same_result(
  tempered_run: tempered_stage.Run,
  trained_tempered: pathlib.Path,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
):
  """Its parents have a parent, and its first step starts from their weights."""
  pair = tempered_run, trained_tempered
  resumes = test_a_stopped_run_saves_and_resumes_to_the_same_result
  resumes(pair, signal.SIGTERM, tmp_path, monkeypatch)


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(
  run_and_reference,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
):
  run, reference = run_and_reference
  with monkeypatch.context() as patch:
    at_step(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(errors.Interrupted):
      train.train_run(run, str(tmp_path))
  for file in (tmp_path / "checkpoints/5/params/d").iterdir():
    file.write_bytes(b"")
  train.train_run(run, str(tmp_path))
  output = capsys.readouterr().err
  assert "checkpoint of step 5" in output and "resuming after step 4" in output
  assert_same(tmp_path, reference)


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
  run_and_reference,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
):
  run, reference = run_and_reference
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

  def fill_the_disk() -> None:
    while not (tmp_path / "checkpoints/2").exists():  # It is saved in the background.
      time.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, hard))  # Enough for figures only.

  try:
    with monkeypatch.context() as patch:
      at_step(patch, 3, fill_the_disk)
      with pytest.raises(errors.CalmError, match=r"step 6 could not be saved .* is step 2"):
        train.train_run(run, str(tmp_path))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert "the last good one is step 2" in capsys.readouterr().err
  assert weights(tmp_path)["step"] == 2
  train.train_run(run, str(tmp_path))
  assert_same(tmp_path, reference)


def test_an_evaluation_ended_by_a_signal_is_repeated_after_the_resume(
  calm_run, trained_calm, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  """The evaluation after step 3 is interrupted; the step is saved instead."""
  evaluate = evaluation.Evaluator.__call__

  def evaluate_after_signal(self, params, stopped):
    signal.raise_signal(signal.SIGINT)
    return evaluate(self, params, stopped)

  with monkeypatch.context() as patch:
    patch.setattr(evaluation.Evaluator, "__call__", evaluate_after_signal)
    with pytest.raises(errors.Interrupted):
      train.train_run(calm_run, str(tmp_path))
  assert weights(tmp_path)["step"] == 3
  assert not figures(tmp_path, "evaluation")
  train.train_run(calm_run, str(tmp_path))
  assert_same(tmp_path, trained_calm)


def test_a_run_that_waits_for_data_stops_at_the_last_step(
  run_and_reference, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  """A void step ends the wait; the next run reads the batch that was missing."""
  run, reference = run_and_reference
  read, released = pipeline.TrainingBatches.__next__, threading.Event()
  taken = []

  def hangs_after_three(self):
    if len(taken) == 3:
      time.sleep(2)  # The loop is now waiting for this batch.
      signal.raise_signal(signal.SIGTERM)
      released.wait()
    taken.append(1)
    return read(self)

  with monkeypatch.context() as patch:
    patch.setattr(pipeline.TrainingBatches, "__next__", hangs_after_three)
    with pytest.raises(errors.Interrupted) as stopped:
      train.train_run(run, str(tmp_path))
    released.set()
  assert stopped.value.code == errors.EXIT_RESTART
  assert weights(tmp_path)["step"] == 3
  assert len(figures(tmp_path, "train")) == 3
  train.train_run(run, str(tmp_path))
  assert_same(tmp_path, reference)


def test_checkpoint_minutes_causes_saves(autoencoder_run, tmp_path: pathlib.Path):
  training = dataclasses.replace(
    autoencoder_run.training, checkpoint_every=100, checkpoint_minutes=1e-9, keep_latest=9
  )
  train.train_run(dataclasses.replace(autoencoder_run, training=training), str(tmp_path))
  assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [*range(1, 7)]


def test_an_evaluation_lost_by_a_kill_is_repeated(
  calm_run, trained_calm: pathlib.Path, tmp_path: pathlib.Path
):
  shutil.copytree(trained_calm, tmp_path / "copy")
  metrics = tmp_path / "copy" / workdir.METRICS
  lines = metrics.read_text().splitlines(keepends=True)
  assert '"evaluation", "step": 6' in lines[-1]
  metrics.write_text("".join(lines[:-1]))
  train.train_run(calm_run, str(tmp_path / "copy"))
  assert_same(tmp_path / "copy", trained_calm)


def test_running_a_finished_run_again_changes_nothing(
  calm_run: calm_stage.Run, trained_calm: pathlib.Path
):
  before = {p: p.stat().st_mtime_ns for p in trained_calm.rglob("checkpoints/6/**/*")}
  figures = (trained_calm / workdir.METRICS).read_text()
  train.train_run(calm_run, str(trained_calm))
  assert before == {p: p.stat().st_mtime_ns for p in trained_calm.rglob("checkpoints/6/**/*")}
  assert (trained_calm / workdir.METRICS).read_text() == figures
