"""Claims about metrics: what is stored and printed, and what a resumed run removes."""

import json
import pathlib
import sys
import types
from typing import ClassVar

import jax
import numpy as np
import pytest
from etils import epath
from jax import numpy as jnp

from calm_jax import config, errors
from calm_jax.stages import calm as calm_stage
from calm_jax.training import metrics, reporter
from calm_jax.training import step as step_lib


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
  return tmp_path / "metrics.jsonl"


def records(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def writer(path: pathlib.Path, first_step: int = 0) -> metrics.Writer:
  return metrics.Writer(epath.Path(path), 10, first_step)


def test_without_a_terminal_each_report_is_a_plain_line(path, capsys: pytest.CaptureFixture[str]):
  writer(path).write("train", 5, {"loss": 1.25, "hidden": 3.0}, ("loss",))
  assert capsys.readouterr().err == "train 5/10  loss 1.25\n"
  assert records(path)[0] | {"time": 0} == {
    "kind": "train",
    "step": 5,
    "time": 0,
    "loss": 1.25,
    "hidden": 3.0,
  }


class Clock:
  """A clock that a test advances."""

  def __init__(self):
    self.now = 1000.0

  def __call__(self) -> float:
    return self.now


def test_the_time_left_excludes_compilation_and_pauses(path, capsys: pytest.CaptureFixture[str]):
  clock = Clock()
  metrics_writer = metrics.Writer(epath.Path(path), 400, 100, clock)

  def time_left(step: int) -> str:
    metrics_writer.write("train", step, {"loss": 1.0}, ("loss",))
    return capsys.readouterr().err.strip().partition("loss 1  ")[2]

  clock.now += 300  # Compiling and the first step.
  metrics_writer.advance(1)
  assert time_left(101) == ""
  for _ in range(99):
    clock.now += 2
    metrics_writer.advance(1)
  assert time_left(200) == "6m40s left"  # 200 steps of 2 s.
  clock.now += 600
  metrics_writer.pause(600)  # An evaluation.
  for _ in range(100):
    clock.now += 2
    metrics_writer.advance(1)
  assert time_left(300) == "3m20s left"


@pytest.mark.parametrize(
  ("seconds", "shown"), [(59, "0m59s"), (3599, "59m59s"), (7500, "2h05m"), (266_400, "3d02h")]
)
def test_the_time_left_is_shown_in_minutes_hours_or_days(seconds: int, shown: str):
  clock = Clock()
  pace = metrics.Pace(clock)
  pace.advance(1)
  clock.now += 1
  pace.advance(1)
  assert pace.left(seconds) == shown


def test_pauses_of_the_reporter_reach_the_writer(path, monkeypatch: pytest.MonkeyPatch):
  report, pauses = report_on(path), []
  monkeypatch.setattr(metrics.Writer, "pause", lambda self, seconds: pauses.append(seconds))
  report.pause(3.0)
  assert pauses == [3.0]


def test_a_resumed_run_removes_reports_after_its_checkpoint(path):
  first = writer(path)
  for step in range(1, 6):
    first.write("train", step, {"loss": float(step)})
  with path.open("a") as file:
    file.write('{"kind": "train", "st')  # Cut by a kill.
  writer(path, first_step=3).write("train", 4, {"loss": 40.0})
  assert [(r["step"], r["loss"]) for r in records(path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_unreadable_lines_are_set_aside_and_reported_once(path, capsys):
  first = writer(path)
  first.write("train", 1, {"loss": 1.0})
  bad = [
    b"{",
    b"[1]",
    b'{"kind": "train"}',
    b'{"kind": "train", "step": "2"}',
    b"\xff\xfe",
    b"[" * 9999,
  ]
  with path.open("ab") as file:
    file.write(b"\n".join(bad) + b"\n")
  first.write("train", 2, {"loss": 2.0})
  capsys.readouterr()
  assert not writer(path, first_step=2).has("train", 3)
  output = capsys.readouterr().err
  assert output == f"{path} holds 6 line(s) that can't be read: moved to {path}.unreadable\n"
  assert [r["step"] for r in records(path)] == [1, 2]
  assert path.with_name("metrics.jsonl.unreadable").read_bytes().splitlines() == bad
  assert writer(path, first_step=2).has("train", 2)
  assert capsys.readouterr().err == ""
  assert metrics.last_step(epath.Path(path)) == 2


class Board:
  """A stand-in for tensorboardX's writer: the points that TensorBoard shows of all attempts.

  The real writer buffers events; `lose` removes those that a kill would lose.
  """

  shown: ClassVar[dict[str, dict[int, float]]] = {}

  def __init__(self, folder: str, purge_step: int):
    pathlib.Path(folder).mkdir(exist_ok=True)
    for points in self.shown.values():
      for step in [step for step in points if step >= purge_step]:
        del points[step]

  def add_scalar(self, name, value, step, walltime=None):
    self.shown.setdefault(name, {})[step] = value

  @classmethod
  def lose(cls, first: int, last: int) -> None:
    for points in cls.shown.values():
      for step in [step for step in points if first <= step <= last]:
        del points[step]


def test_tensorboard_has_all_points_after_a_kill(path, monkeypatch):
  """Steps 30 and 40 were not flushed; step 50 was, and is after the checkpoint."""
  module = types.SimpleNamespace(SummaryWriter=Board, __spec__=object())
  monkeypatch.setitem(sys.modules, "tensorboardX", module)
  monkeypatch.setattr(Board, "shown", {})
  first = metrics.Writer(epath.Path(path), 100, 0)
  for step in range(10, 60, 10):
    first.write("train", step, {"loss": float(step), "note": "text"})
  Board.lose(30, 40)
  second = metrics.Writer(epath.Path(path), 100, 40)
  assert Board.shown == {"train/loss": {10: 10.0, 20: 20.0, 30: 30.0, 40: 40.0}}
  second.write("train", 50, {"loss": 51.0})
  third = metrics.Writer(epath.Path(path), 100, 50)
  assert Board.shown["train/loss"] == {10: 10.0, 20: 20.0, 30: 30.0, 40: 40.0, 50: 51.0}
  third.write("evaluation", 50, {"brier_lm": 1.0})
  assert Board.shown["evaluation/brier_lm"] == {50: 1.0}


def test_tensorboard_receives_only_the_last_minutes_again(path, monkeypatch):
  module = types.SimpleNamespace(SummaryWriter=Board, __spec__=object())
  monkeypatch.setitem(sys.modules, "tensorboardX", module)
  monkeypatch.setattr(Board, "shown", {})
  (path.parent / "tensorboard").mkdir()
  lines = [{"kind": "train", "step": step, "time": 100.0 * step, "loss": 1.0} for step in range(20)]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  metrics.Writer(epath.Path(path), 100, 18)
  assert list(Board.shown["train/loss"]) == [12, 13, 14, 15, 16, 17, 18]
  (path.parent / "tensorboard").rmdir()
  metrics.Writer(epath.Path(path), 100, 18)
  assert len(Board.shown["train/loss"]) == 19


def test_non_finite_figures_are_stored_as_null(path):
  writer(path).write("train", 1, {"loss": float("nan"), "gradient_norm": float("inf")})
  (record,) = records(path)
  assert record["loss"] is record["gradient_norm"] is None


def test_a_report_that_can_not_be_written_is_an_error_of_one_line(path):
  metrics_writer = writer(path)
  path.mkdir()
  with pytest.raises(errors.CalmError, match=r"metrics\.jsonl is a folder, not a file"):
    metrics_writer.write("train", 1, {"loss": 1.0})


def figures(step: int, loss: float = 1.0, in_a_row: int = 0) -> dict[str, jax.Array]:
  values = {"loss": loss, "gradient_norm": 2.0, "patches_per_token": 0.25, "step": step}
  values |= {"finite": np.isfinite(loss), "skipped_in_a_row": in_a_row}
  values |= dict.fromkeys(step_lib.SIGNALS, 0)
  return {name: jnp.asarray(value) for name, value in values.items()}


def report_on(path: pathlib.Path, **training) -> reporter.Reporter:
  run = calm_stage.Run(
    data=config.Data("", 8), training=config.Training(batch=4, steps=10, **training)
  )
  return reporter.Reporter(run, writer(path), flops_per_token=100.0, first_step=0, shown=())


def test_a_steps_figures_are_read_after_the_next_dispatch(path):
  report = report_on(path, log_every=1)
  report.push(1, figures(1), np.arange(4))
  assert not path.exists()
  report.push(2, figures(2), np.arange(4))
  assert [r["step"] for r in records(path)] == [1]
  report.flush()
  assert [r["step"] for r in records(path)] == [1, 2]


def test_speeds_are_tokens_divided_by_seconds(path):
  report = report_on(path, log_every=2)
  for step in range(1, 4):
    report.wait_for_data(1e-4)
    report.push(step, figures(step), np.arange(4))
  (record,) = records(path)
  tokens = 2 * 4 * 8
  assert record["tokens_per_second"] == pytest.approx(tokens / record["seconds"])
  assert record["patches_per_second"] == pytest.approx(tokens / 4 / record["seconds"])
  assert record["data_wait_share"] > 0 and record["flops"] == 100 * tokens


def test_skipped_steps_are_reported_with_their_examples_and_too_many_end_the_run(
  path, capsys: pytest.CaptureFixture[str]
):
  report = report_on(path, max_skipped=2)
  report.push(1, figures(1, np.nan, in_a_row=1), np.array([7, 3, 4, 5]))
  report.push(2, figures(2, np.inf, in_a_row=2), np.array([9, 1, 0, 12]))
  output = capsys.readouterr().err
  assert "step 1 was skipped: loss nan" in output and "examples 3-5, 7" in output
  with pytest.raises(errors.CalmError, match=r"2 non-finite steps in a row.*examples 0-1, 9, 12"):
    report.flush()
