"""Claims about where folders are written: nothing half is left, whatever ends the process."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

from calm_jax import errors
from calm_jax.interchange import destination

# Before what a test runs: a process that is started in the background ignores Ctrl-C.
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
WRITES = HEARS + textwrap.dedent("""
  import os, sys, threading, time
  from calm_jax import interrupts
  from calm_jax.interchange import destination

  interrupts.end_at_once()

  def save(folder):
    os.mkdir(folder / "checkpoints")
    while folder.exists():
      (folder / f"checkpoints/{time.time()}").write_text("")

  with destination.new_folder(sys.argv[1]) as folder:
    (folder / "half").write_text("")
    if sys.argv[2:]:
      threading.Thread(target=save, args=(folder,), daemon=True).start()
    print("writing", flush=True)
    time.sleep(600)
""")


def writing(output: pathlib.Path, *args: str) -> subprocess.Popen:
  """A process that has begun to write a folder and does not end."""
  command = [sys.executable, "-c", WRITES, str(output), *args]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  assert process.stdout and process.stdout.readline() == "writing\n"
  return process


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
  with writing(tmp_path / "out") as process:
    process.kill()
  (left,) = tmp_path.iterdir()
  assert left.name.startswith(".out.")
  with destination.new_folder(str(tmp_path / "out")) as folder:
    assert not left.exists() and folder.name == "out"
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_process_still_writes_and_what_is_not_ours_is_left_alone(tmp_path):
  own = tmp_path / ".out.notes"
  own.mkdir()
  with writing(tmp_path / "out") as process:
    (held,) = set(tmp_path.iterdir()) - {own}
    with destination.new_folder(str(tmp_path / "out")):
      pass
    assert (held / "out/half").exists() and own.exists()
    process.kill()


@pytest.mark.parametrize("busy", [(), ("busy",)], ids=["idle", "a thread writes"])
def test_ctrl_c_is_one_word_and_leaves_nothing(busy, tmp_path):
  with writing(tmp_path / "out", *busy) as process:
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
  assert (process.returncode, told) == (errors.EXIT_INTERRUPTED, "interrupted\n")
  left = [path for path in tmp_path.iterdir() if not busy or any(path.glob("out/half"))]
  assert not left  # What threads write on until the process has ended, the next run removes.
  with destination.new_folder(str(tmp_path / "out")):
    pass
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_while_jax_is_imported_is_one_word(tmp_path):
  (tmp_path / "jax").mkdir()
  (tmp_path / "jax/__init__.py").write_text(
    "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
  )
  code = f"{HEARS}import runpy; runpy.run_module('calm_jax.convert', run_name='__main__')"
  paths = os.pathsep.join([str(tmp_path), str(pathlib.Path(__file__).parent.parent)])
  found = subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | {"PYTHONPATH": paths},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (found.returncode, found.stderr) == (errors.EXIT_INTERRUPTED, "interrupted\n")


def test_an_exception_leaves_nothing(tmp_path):
  with pytest.raises(KeyError), destination.new_folder(str(tmp_path / "out")) as folder:
    (folder / "half").write_text("")
    raise KeyError
  assert not list(tmp_path.iterdir())


def test_a_lock_that_cant_be_put_in_place_leaves_nothing(tmp_path, monkeypatch):
  def fails(self, target):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(pathlib.Path, "rename", fails)
  with (
    pytest.raises(errors.CalmError, match=r"can't write --output=.*No space left"),
    destination.new_folder(str(tmp_path / "out")),
  ):
    pass
  assert not list(tmp_path.iterdir())
