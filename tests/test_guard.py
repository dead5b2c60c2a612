"""Claims about signals, the watchdog, time accounting and the feed of batches."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from etils import epath
from processes import ROOT, finish, start

from calm_jax import config, errors
from calm_jax.data import pipeline
from calm_jax.data import store as store_lib
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.training import feed, ledger, stopping

# A program with a guard, which waits for a signal or for the watchdog.
WAITING = """
import time
from calm_jax import config
from calm_jax.training import guard
with guard.Guard(config.Limits(startup_minutes={minutes})) as guard_context:
  guard_context.stop.unsaved = {unsaved}
  print("ready", flush=True)
  try:
    time.sleep(100)
  finally:
    print(guard_context.stop.signal, flush=True)
"""


def start_waiting(unsaved: bool, minutes: float = 5) -> subprocess.Popen:
  process = start(sys.executable, "-c", WAITING.format(unsaved=unsaved, minutes=minutes))
  assert process.stdout and process.stdout.readline() == "ready\n"
  return process


@pytest.mark.parametrize(
  ("number", "code"),
  [(signal.SIGTERM, errors.EXIT_RESTART), (signal.SIGINT, errors.EXIT_INTERRUPTED)],
)
def test_with_nothing_unsaved_a_signal_ends_the_process_immediately(number, code):
  process = start_waiting(unsaved=False)
  process.send_signal(number)
  actual, _, output = finish(process)
  assert actual == code
  assert output == f"{number.name}: nothing is unsaved; the same command resumes from here\n"


def test_a_phase_over_its_limit_ends_the_process_with_all_stacks():
  process = start_waiting(unsaved=True, minutes=0.01)
  code, _, output = finish(process)
  assert code == errors.EXIT_RESTART
  assert "startup has taken more than config.limits.startup_minutes=0.01: stopping" in output
  assert output.count("most recent call first") >= 3 and "<string>" in output


def test_the_first_signal_is_stored_and_the_second_has_its_usual_effect():
  with stopping.Stop() as stop:
    signal.raise_signal(signal.SIGINT)
    assert stop.signal is signal.SIGINT and stop.code == errors.EXIT_INTERRUPTED
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_sigint_that_was_ignored_at_the_start_stays_ignored():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with stopping.Stop() as stop:
      signal.raise_signal(signal.SIGINT)
      assert stop.signal is None
      signal.raise_signal(signal.SIGTERM)
      assert stop.signal is signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGINT, before)


def test_processes_that_tests_start_do_not_ignore_sigint():
  """As in a background job of a script: conftest restores the default handler."""
  code = (
    "import signal, conftest; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
  )
  ignoring = f"trap '' INT; exec {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
  environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
  code, output, errors = finish(start("bash", "-c", ignoring, **environment))
  assert (code, output) == (0, "True\n"), errors


def attempt(folder: pathlib.Path, number: int, steps, times, **seconds) -> None:
  record = {
    "started": times[0],
    "written": times[1],
    "first_step": steps[0],
    "last_step": steps[1],
    "seconds": {**dict.fromkeys(ledger.KINDS, 0.0), **seconds},
  }
  folder.mkdir(exist_ok=True)
  (folder / f"{number:04d}.json").write_text(json.dumps(record))


def test_goodput_by_hand(tmp_path: pathlib.Path):
  """Three attempts.

  20 s of startup and 100 s of 10 steps, of which 4 are lost; 30 s down; 6 steps in 60 s; 15 s
  without a step.
  """
  folder = tmp_path / ledger.FOLDER
  attempt(folder, 1, (0, 10), (1000, 1125), startup=20, save=5)
  attempt(folder, 2, (6, 12), (1155, 1225), startup=10)
  attempt(folder, 3, (12, 12), (1225, 1240))
  result = ledger.goodput(epath.Path(tmp_path))
  assert result is not None and result["attempts"] == 3 and result["total"] == 240
  assert result["productive"] == 60 + 60 and result["lost"] == 40 and result["down"] == 30
  assert result["startup"] == 30 + 15 and result["save"] == 5
  assert result["goodput"] == pytest.approx(120 / 240, abs=1e-4)
  assert ledger.goodput(epath.Path(tmp_path / "nothing")) is None


def test_the_ledger_records_parts_steps_and_seconds(tmp_path: pathlib.Path):
  attempt_ledger = ledger.Ledger()
  attempt_ledger.part("join")
  line = attempt_ledger.first_step()
  assert line.startswith("first step after ") and "join" in line and "imports" in line
  for number in (1, 2):
    attempt_ledger.open(epath.Path(tmp_path), first_step=4)
    with attempt_ledger.timed("evaluation"):
      time.sleep(0.05)
    attempt_ledger.write(7)
    record = json.loads((tmp_path / f"ledger/{number:04d}.json").read_text())
    assert (record["first_step"], record["last_step"]) == (4, 7)
    assert record["seconds"]["evaluation"] >= 0.05 * number


@pytest.mark.parametrize("damaged", ["", "{", "[]", "{}", '{"first_step": "1"}'])
def test_a_damaged_ledger_file_is_set_aside_and_its_number_is_not_reused(
  damaged: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
  folder = tmp_path / ledger.FOLDER
  attempt(folder, 1, (0, 10), (1000, 1125), startup=25)
  (folder / "0002.json").write_text(damaged)
  (folder / "notes.json").write_text("not ours")
  result = ledger.goodput(epath.Path(tmp_path))
  assert result is not None and result["attempts"] == 1 and result["productive"] == 100
  ledger.Ledger().open(epath.Path(tmp_path), first_step=10)
  output = capsys.readouterr().err
  assert output == f"{folder}/0002.json can't be read: moved to {folder}/0002.json.unreadable\n"
  names = {"0001.json", "0002.json.unreadable", "0003.json", "notes.json"}
  assert {path.name for path in folder.iterdir()} == names
  assert len(ledger.attempts(epath.Path(tmp_path))) == 2


def test_impossible_times_make_a_ledger_file_unreadable(tmp_path: pathlib.Path):
  attempt(tmp_path / ledger.FOLDER, 1, (0, 10), (1000, int("9" * 400)), startup=25)
  assert not ledger.attempts(epath.Path(tmp_path))
  attempt(tmp_path / ledger.FOLDER, 2, (0, 0), (1000, 1000), startup=0)
  result = ledger.goodput(epath.Path(tmp_path))
  assert result is not None and result["goodput"] == 0


def test_a_file_instead_of_the_ledgers_folder_is_set_aside(tmp_path: pathlib.Path):
  (tmp_path / ledger.FOLDER).write_text("torn")
  ledger.Ledger().open(epath.Path(tmp_path), first_step=0)
  assert (tmp_path / f"{ledger.FOLDER}.unreadable").read_text() == "torn"
  assert len(ledger.attempts(epath.Path(tmp_path))) == 1


@pytest.fixture
def batches(tokens: str) -> pipeline.TrainingBatches:
  return pipeline.TrainingBatches(store_lib.TokenStore.open(tokens), 32, 8, seed=0)


def make_feed(batches, reuse=False) -> feed.Feed:
  return feed.Feed(batches, mesh_lib.build(config.Mesh()), 8, np.arange(8), reuse)


def test_a_feed_returns_the_batches_with_the_position_after_each(tokens, batches):
  plain = pipeline.TrainingBatches(store_lib.TokenStore.open(tokens), 32, 8, seed=0)
  batch_feed = make_feed(batches)
  for number in range(1, 4):
    result, expected = batch_feed.take(lambda: True), next(plain)
    assert result is not None and result.position == {"global_next_index": 8 * number}
    np.testing.assert_array_equal(result.arrays["tokens"], expected["tokens"])
    np.testing.assert_array_equal(result.index, expected["index"])
  batch_feed.close()


def test_a_reused_batch_is_always_the_first(batches):
  batch_feed = make_feed(batches, reuse=True)
  first, second = batch_feed.take(lambda: True), batch_feed.take(lambda: True)
  assert first is not None and first is second
  batch_feed.close()


def test_a_hanging_feed_can_be_abandoned_and_a_failing_feed_raises(batches, monkeypatch):
  hang = threading.Event()
  monkeypatch.setattr(pipeline.TrainingBatches, "__next__", lambda self: hang.wait())
  batch_feed = make_feed(batches)
  assert batch_feed.take(lambda: False) is None
  hang.set()
  batch_feed.close()

  def fail(self):
    raise errors.CalmError("the disk is gone")

  monkeypatch.setattr(pipeline.TrainingBatches, "__next__", fail)
  batch_feed = make_feed(batches)
  with pytest.raises(errors.CalmError, match="the disk is gone"):
    batch_feed.take(lambda: True)
  batch_feed.close()


def test_sigterm_during_the_import_of_jax_requests_a_restart(tmp_path: pathlib.Path):
  """A stand-in for JAX sleeps when it is imported."""
  (tmp_path / "jax.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(100)\n")
  environment = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
  process = start(sys.executable, "-m", "calm_jax.main", **environment)
  assert process.stdout and process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGTERM)
  assert finish(process) == (errors.EXIT_RESTART, "", "")
