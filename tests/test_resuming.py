"""Claims about runs that stop being finite: what is saved of them, and what they go on from."""

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


def spoil(patch: pytest.MonkeyPatch, first: int) -> None:
  """Makes the loss NaN from a step on."""
  spec = table.STAGES["autoencoder"]

  def spoilt(run, model, parents):
    stage = spec.stage(run, model, parents)

    def loss(params, frozen, batch, key):
      value, metrics = stage.loss(params, frozen, batch, key)
      step = 1 + batch["index"][0] // run.training.batch
      return jnp.where(step >= first, jnp.nan, value), metrics

    return dataclasses.replace(stage, loss=loss)

  patch.setitem(table.STAGES, "autoencoder", dataclasses.replace(spec, stage=spoilt))


def steps(directory: pathlib.Path, folder: str = checkpoint.DIRECTORY) -> list[int]:
  place = directory / folder
  return sorted(int(path.name) for path in place.iterdir()) if place.exists() else []


def stopped(run: config.Run, directory: pathlib.Path, reason: str) -> None:
  with pytest.raises(errors.CalmError, match=reason) as caught:
    train.train_run(run, str(directory))
  assert "\n" not in str(caught.value)


def test_a_checkpoint_that_nothing_finite_came_after_is_not_gone_on_from(
  run, tmp_path, monkeypatch, capsys
):
  with monkeypatch.context() as patch:
    spoil(patch, first=5)
    reason = r"4 non-finite steps .*step 4, which nothing .* set aside; the last good one is step 2"
    stopped(run, tmp_path, reason + ": resume from it with a --config.optimizer.learning_rate")
  assert steps(tmp_path) == [2]
  assert steps(tmp_path, checkpoint.UNREADABLE) == [4]
  assert "step 6 is not saved, as the 2 before it were skipped" in capsys.readouterr().err
  slower = dataclasses.replace(run.optimizer, learning_rate=1e-4)
  changed = dataclasses.replace(run, optimizer=slower)
  train.train_run(changed, str(tmp_path), train.Options(allow_config_change=True))
  assert "resuming after step 2" in capsys.readouterr().err
  assert steps(tmp_path)[-1] == 12


class Kept:
  """Checkpoints of these steps."""

  def __init__(self, *steps: int):
    self.found = list(steps)

  def wait(self) -> bool:
    return True

  def steps(self) -> list[int]:
    return self.found

  def set_aside_after(self, step: int) -> None:
    self.found = [other for other in self.found if other <= step]


@pytest.mark.parametrize(
  ("kept", "good", "left", "told"),
  [
    ([2, 4], 4, [2], "step 4, which nothing finite came after, is set aside; .* is step 2: resume"),
    ([2, 4], 5, [2, 4], "the last good checkpoint is step 4: resume from it with a --config.opt"),
    ([2], 2, [2], "the only checkpoint, step 2, may be spoilt, .*, or give a new --workdir"),
    ([], 1, [], "there is no checkpoint: run the same command again with a --config.optimizer"),
  ],
)
def test_only_a_checkpoint_with_no_finite_step_after_it_is_set_aside(kept, good, left, told):
  checkpoints = Kept(*kept)
  error = resuming.NonFinite("", good)
  found = resuming.step_back(checkpoints, error, 0.5)
  assert re.search(told, found) and "learning_rate below 0.5" in found
  assert checkpoints.found == left


def test_a_run_whose_last_steps_were_skipped_has_not_ended_well(run, tmp_path, monkeypatch):
  spoil(monkeypatch, first=11)
  stopped(run, tmp_path, "step 12 is not saved, as the 2 before it were skipped; the checkpoint of")
  assert steps(tmp_path) == [6, 8]


def test_a_workdir_may_be_named_from_where_the_run_starts(
  calm_run, trained_autoencoder, tmp_path, monkeypatch
):
  """Orbax reads absolute paths alone: the first save was read back as damaged."""
  monkeypatch.chdir(tmp_path)
  shutil.copytree(trained_autoencoder, "ae")
  training = dataclasses.replace(calm_run.training, steps=2, eval_every=0)
  train.train_run(dataclasses.replace(calm_run, autoencoder="ae", training=training), "runs/lm")
  assert loading.load("runs/lm").step == 2
  shown: list[str] = []
  verify.verify("runs/lm", shown.append)
  assert shown[-1].endswith("checks, all as written")


def test_a_save_that_failed_is_not_told_as_saved(run, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint.Checkpoints, "save", lambda *args: False)
  at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
  stopped(run, tmp_path, "step 2 could not be saved")


def test_a_stop_while_steps_are_skipped_saves_nothing(run, tmp_path, monkeypatch):
  spoil(monkeypatch, first=5)
  at_step(monkeypatch, 6, lambda: signal.raise_signal(signal.SIGTERM))
  with pytest.raises(errors.Interrupted, match="SIGTERM: the same command resumes from step 4"):
    train.train_run(run, str(tmp_path))
  assert steps(tmp_path) == [2, 4]


def test_a_state_that_is_not_finite_is_not_saved(run, tmp_path, monkeypatch):
  whole = checkpoint.all_finite
  tested = []

  def turns_bad(tree):
    tested.append(1)
    return len(tested) < 3 and whole(tree)

  monkeypatch.setattr(checkpoint, "all_finite", turns_bad)
  stopped(run, tmp_path, "after step 6 holds non-finite values; the last good .* is step 4: resume")
  assert steps(tmp_path) == [2, 4]


def test_a_first_checkpoint_that_does_not_read_back_ends_the_run(run, tmp_path, monkeypatch):
  wait = checkpoint.Checkpoints.wait

  def cuts(self):
    good = wait(self)
    for file in (tmp_path / "checkpoints").glob("2/params/d/*"):
      file.write_bytes(file.read_bytes()[:-1])
    return good

  monkeypatch.setattr(checkpoint.Checkpoints, "wait", cuts)
  stopped(run, tmp_path, r"step 2 was saved .* can't be read back .*last good checkpoint is none")
  assert steps(tmp_path) == []
