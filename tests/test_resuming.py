"""Claims about runs with non-finite steps: what they save, and what they resume from."""

import dataclasses
import pathlib
import re
import shutil
import signal

import jax.numpy as jnp
import pytest
from test_resume import at_step

from calm_jax import config, errors, verify
from calm_jax.running import loading, train
from calm_jax.stages import autoencoder as autoencoder_stage
from calm_jax.stages import table
from calm_jax.training import checkpoint, resuming


@pytest.fixture
def run(autoencoder_run: autoencoder_stage.Run) -> autoencoder_stage.Run:
  training = dataclasses.replace(
    autoencoder_run.training, steps=12, eval_every=0, checkpoint_every=2, max_skipped=4
  )
  return dataclasses.replace(autoencoder_run, training=training)


def make_loss_nan(patch: pytest.MonkeyPatch, first: int) -> None:
  """Makes the loss NaN from a step on."""
  spec = table.STAGES["autoencoder"]

  def nan_stage(run, model, parents):
    stage = spec.stage(run, model, parents)

    def loss(params, frozen, batch, key):
      value, metrics = stage.loss(params, frozen, batch, key)
      step = 1 + batch["index"][0] // run.training.batch
      return jnp.where(step >= first, jnp.nan, value), metrics

    return dataclasses.replace(stage, loss=loss)

  patch.setitem(table.STAGES, "autoencoder", dataclasses.replace(spec, stage=nan_stage))


def steps(directory: pathlib.Path, folder: str = checkpoint.DIRECTORY) -> list[int]:
  place = directory / folder
  return sorted(int(path.name) for path in place.iterdir()) if place.exists() else []


def assert_stops(run: config.Run, directory: pathlib.Path, reason: str) -> None:
  with pytest.raises(errors.CalmError, match=reason) as caught:
    train.train_run(run, str(directory))
  assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_finite_step_after_it_is_not_resumed_from(
  run, tmp_path, monkeypatch, capsys
):
  with monkeypatch.context() as patch:
    make_loss_nan(patch, first=5)
    reason = (
      r"4 non-finite steps .*step 4, which no finite step .* set aside; the last good one is step 2"
    )
    assert_stops(run, tmp_path, reason + ": resume from it with a --config.optimizer.learning_rate")
  assert steps(tmp_path) == [2]
  assert steps(tmp_path, checkpoint.UNREADABLE) == [4]
  assert "step 6 is not saved, as the 2 before it were skipped" in capsys.readouterr().err
  slower = dataclasses.replace(run.optimizer, learning_rate=1e-4)
  changed = dataclasses.replace(run, optimizer=slower)
  train.train_run(changed, str(tmp_path), train.Options(allow_config_change=True))
  assert "resuming after step 2" in capsys.readouterr().err
  assert steps(tmp_path)[-1] == 12


class FakeCheckpoints:
  """A stand-in for `checkpoint.Checkpoints` with these steps."""

  def __init__(self, *steps: int):
    self.saved_steps = list(steps)

  def wait(self) -> bool:
    return True

  def steps(self) -> list[int]:
    return self.saved_steps

  def set_aside_after(self, step: int) -> None:
    self.saved_steps = [other for other in self.saved_steps if other <= step]


@pytest.mark.parametrize(
  ("before", "good", "after", "advice"),
  [
    ([2, 4], 4, [2], "step 4, which no finite step followed, is set aside; .* is step 2: resume"),
    ([2, 4], 5, [2, 4], "the last good checkpoint is step 4: resume from it with a --config.opt"),
    ([2], 2, [2], "the only checkpoint, step 2, may be damaged, .*, or give a new --workdir"),
    ([], 1, [], "there is no checkpoint: run the same command again with a --config.optimizer"),
  ],
)
def test_only_a_checkpoint_with_no_finite_step_after_it_is_set_aside(before, good, after, advice):
  checkpoints = FakeCheckpoints(*before)
  error = resuming.NonFinite("", good)
  message = resuming.step_back(checkpoints, error, 0.5)
  assert re.search(advice, message) and "learning_rate below 0.5" in message
  assert checkpoints.saved_steps == after


def test_a_run_whose_last_steps_were_skipped_is_an_error(run, tmp_path, monkeypatch):
  make_loss_nan(monkeypatch, first=11)
  assert_stops(
    run, tmp_path, "step 12 is not saved, as the 2 before it were skipped; the checkpoint of"
  )
  assert steps(tmp_path) == [6, 8]


def test_a_workdir_may_be_a_relative_path(calm_run, trained_autoencoder, tmp_path, monkeypatch):
  """Orbax reads only absolute paths: a first save once read back as damaged."""
  monkeypatch.chdir(tmp_path)
  shutil.copytree(trained_autoencoder, "ae")
  training = dataclasses.replace(calm_run.training, steps=2, eval_every=0)
  train.train_run(dataclasses.replace(calm_run, autoencoder="ae", training=training), "runs/lm")
  assert loading.load("runs/lm").step == 2
  shown: list[str] = []
  verify.verify("runs/lm", shown.append)
  assert shown[-1].endswith("checks, all as written")


def test_a_failed_save_is_not_reported_as_saved(run, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint.Checkpoints, "save", lambda *args: False)
  at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
  assert_stops(run, tmp_path, "step 2 could not be saved")


def test_a_stop_after_skipped_steps_saves_nothing(run, tmp_path, monkeypatch):
  make_loss_nan(monkeypatch, first=5)
  at_step(monkeypatch, 6, lambda: signal.raise_signal(signal.SIGTERM))
  with pytest.raises(errors.Interrupted, match="SIGTERM: the same command resumes from step 4"):
    train.train_run(run, str(tmp_path))
  assert steps(tmp_path) == [2, 4]


def test_a_non_finite_state_is_not_saved(run, tmp_path, monkeypatch):
  all_finite = checkpoint.all_finite
  tested = []

  def finite_twice(tree):
    tested.append(1)
    return len(tested) < 3 and all_finite(tree)

  monkeypatch.setattr(checkpoint, "all_finite", finite_twice)
  assert_stops(
    run, tmp_path, "after step 6 holds non-finite values; the last good .* is step 4: resume"
  )
  assert steps(tmp_path) == [2, 4]


def test_a_first_checkpoint_that_does_not_read_back_ends_the_run(run, tmp_path, monkeypatch):
  wait = checkpoint.Checkpoints.wait

  def wait_and_truncate(self):
    good = wait(self)
    for file in (tmp_path / "checkpoints").glob("2/params/d/*"):
      file.write_bytes(file.read_bytes()[:-1])
    return good

  monkeypatch.setattr(checkpoint.Checkpoints, "wait", wait_and_truncate)
  assert_stops(
    run, tmp_path, r"step 2 was saved .* can't be read back .*last good checkpoint is none"
  )
  assert steps(tmp_path) == []
