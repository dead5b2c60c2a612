"""Claims about what stands around a run: the stop, the clocks, the book of time, the feed."""

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

# A program with a guard, which waits for a signal or for its clock.
WAITING = """
import time
from calm_jax import config
from calm_jax.training import guard
with guard.Guard(config.Limits(startup_minutes={minutes})) as found:
  found.stop.unsaved = {unsaved}
  print("ready", flush=True)
  try:
    time.sleep(100)
  finally:
    print(found.stop.signal, flush=True)
"""


def waiting(unsaved: bool, minutes: float = 5) -> subprocess.Popen:
  process = start(sys.executable, "-c", WAITING.format(unsaved=unsaved, minutes=minutes))
  assert process.stdout and process.stdout.readline() == "ready\n"
  return process


@pytest.mark.parametrize(
  ("number", "code"),
  [(signal.SIGTERM, errors.EXIT_RESTART), (signal.SIGINT, errors.EXIT_INTERRUPTED)],
)
def test_with_nothing_unsaved_a_signal_ends_the_process_whatever_it_does(number, code):
  process = waiting(unsaved=False)
  process.send_signal(number)
  found, _, said = finish(process)
  assert found == code
  assert said == f"{number.name}: nothing is unsaved; the same command resumes from here\n"


def test_a_phase_that_takes_too_long_ends_with_all_stacks():
  process = waiting(unsaved=True, minutes=0.01)
  code, _, said = finish(process)
  assert code == errors.EXIT_RESTART
  assert "startup has taken more than config.limits.startup_minutes=0.01: stopping" in said
  assert said.count("most recent call first") >= 3 and "<string>" in said


def test_a_stop_is_noted_once_and_the_next_signal_acts_as_before():
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


def test_children_of_tests_heed_sigint_however_the_tests_were_started():
  """As in a background job of a script: what pytest collects restores the signal first."""
  code = (
    "import signal, conftest; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
  )
  ignoring = f"trap '' INT; exec {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
  environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
  code, said, errors = finish(start("bash", "-c", ignoring, **environment))
  assert (code, said) == (0, "True\n"), errors


def attempt(folder: pathlib.Path, number: int, steps, times, **seconds) -> None:
  record = {
    "started": times[0], "written": times[1], "first_step": steps[0], "last_step": steps[1],
    "seconds": {**dict.fromkeys(ledger.KINDS, 0.0), **seconds},
  }  # fmt: skip
  folder.mkdir(exist_ok=True)
  (folder / f"{number:04d}.json").write_text(json.dumps(record))


def test_goodput_by_hand(tmp_path: pathlib.Path):
  """20 s of startup, 100 s of 10 steps of which 4 are lost, 30 s down; then 6 steps in
  60 s; then 15 s without a step."""
  folder = tmp_path / ledger.FOLDER
  attempt(folder, 1, (0, 10), (1000, 1125), startup=20, save=5)
  attempt(folder, 2, (6, 12), (1155, 1225), startup=10)
  attempt(folder, 3, (12, 12), (1225, 1240))
  found = ledger.goodput(epath.Path(tmp_path))
  assert found is not None and found["attempts"] == 3 and found["total"] == 240
  assert found["productive"] == 60 + 60 and found["lost"] == 40 and found["down"] == 30
  assert found["startup"] == 30 + 15 and found["save"] == 5
  assert found["goodput"] == pytest.approx(120 / 240, abs=1e-4)
  assert ledger.goodput(epath.Path(tmp_path / "nothing")) is None


def test_the_ledger_books_every_second(tmp_path: pathlib.Path):
  book = ledger.Ledger()
  book.part("join")
  told = book.first_step()
  assert told.startswith("first step after ") and "join" in told and "imports" in told
  for number in (1, 2):
    book.open(epath.Path(tmp_path), first_step=4)
    with book.timed("evaluation"):
      time.sleep(0.05)
    book.write(7)
    record = json.loads((tmp_path / f"ledger/{number:04d}.json").read_text())
    assert (record["first_step"], record["last_step"]) == (4, 7)
    assert record["seconds"]["evaluation"] >= 0.05 * number


@pytest.mark.parametrize("damaged", ["", "{", "[]", "{}", '{"first_step": "1"}'])
def test_a_damaged_book_is_put_aside_and_its_number_not_used_again(
  damaged: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
  folder = tmp_path / ledger.FOLDER
  attempt(folder, 1, (0, 10), (1000, 1125), startup=25)
  (folder / "0002.json").write_text(damaged)
  (folder / "notes.json").write_text("not ours")
  found = ledger.goodput(epath.Path(tmp_path))
  assert found is not None and found["attempts"] == 1 and found["productive"] == 100
  ledger.Ledger().open(epath.Path(tmp_path), first_step=10)
  said = capsys.readouterr().err
  assert said == f"{folder}/0002.json can't be read: moved to {folder}/0002.json.unreadable\n"
  names = {"0001.json", "0002.json.unreadable", "0003.json", "notes.json"}
  assert {path.name for path in folder.iterdir()} == names
  assert len(ledger.attempts(epath.Path(tmp_path))) == 2


def test_times_that_no_clock_shows_make_a_book_unreadable(tmp_path: pathlib.Path):
  attempt(tmp_path / ledger.FOLDER, 1, (0, 10), (1000, int("9" * 400)), startup=25)
  assert not ledger.attempts(epath.Path(tmp_path))
  attempt(tmp_path / ledger.FOLDER, 2, (0, 0), (1000, 1000), startup=0)
  found = ledger.goodput(epath.Path(tmp_path))
  assert found is not None and found["goodput"] == 0


def test_a_file_in_the_place_of_the_ledger_is_put_aside(tmp_path: pathlib.Path):
  (tmp_path / ledger.FOLDER).write_text("torn")
  ledger.Ledger().open(epath.Path(tmp_path), first_step=0)
  assert (tmp_path / f"{ledger.FOLDER}.unreadable").read_text() == "torn"
  assert len(ledger.attempts(epath.Path(tmp_path))) == 1


@pytest.fixture
def batches(tokens: str) -> pipeline.TrainingBatches:
  return pipeline.TrainingBatches(store_lib.TokenStore.open(tokens), 32, 8, seed=0)


def fed(batches, reuse=False) -> feed.Feed:
  return feed.Feed(batches, mesh_lib.build(config.Mesh()), 8, np.arange(8), reuse)


def test_a_feed_gives_the_batches_with_the_position_after_each(tokens, batches):
  plain = pipeline.TrainingBatches(store_lib.TokenStore.open(tokens), 32, 8, seed=0)
  ahead = fed(batches)
  for number in range(1, 4):
    found, expected = ahead.take(lambda: True), next(plain)
    assert found is not None and found.position == {"global_next_index": 8 * number}
    np.testing.assert_array_equal(found.arrays["tokens"], expected["tokens"])
    np.testing.assert_array_equal(found.index, expected["index"])
  ahead.close()


def test_a_reused_batch_is_always_the_first(batches):
  ahead = fed(batches, reuse=True)
  first, second = ahead.take(lambda: True), ahead.take(lambda: True)
  assert first is not None and first is second
  ahead.close()


def test_a_feed_that_hangs_is_given_up_and_one_that_fails_raises(batches, monkeypatch):
  hang = threading.Event()
  monkeypatch.setattr(pipeline.TrainingBatches, "__next__", lambda self: hang.wait())
  ahead = fed(batches)
  assert ahead.take(lambda: False) is None
  hang.set()
  ahead.close()

  def fail(self):
    raise errors.CalmError("the disk is gone")

  monkeypatch.setattr(pipeline.TrainingBatches, "__next__", fail)
  ahead = fed(batches)
  with pytest.raises(errors.CalmError, match="the disk is gone"):
    ahead.take(lambda: True)
  ahead.close()


def test_sigterm_while_jax_is_imported_asks_for_another_start(tmp_path: pathlib.Path):
  """A stand-in for JAX takes its time."""
  (tmp_path / "jax.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(100)\n")
  environment = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
  process = start(sys.executable, "-m", "calm_jax.main", **environment)
  assert process.stdout and process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGTERM)
  assert finish(process) == (errors.EXIT_RESTART, "", "")
