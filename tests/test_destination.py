"""Claims about output folders: however the process ends, no partial folder is left for good."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

from calm_jax import errors
from calm_jax.interchange import destination

# For the code of a test: a process that is started in the background ignores Ctrl-C.
HANDLE_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
WRITE = HANDLE_CTRL_C + textwrap.dedent("""
  import contextlib, os, sys, threading, time
  from calm_jax import interrupts
  from calm_jax.interchange import destination

  interrupts.end_at_once()

  def save(folder):
    os.mkdir(folder / "checkpoints")
    while folder.exists():
      with contextlib.suppress(FileNotFoundError):  # The folder is being removed.
        (folder / f"checkpoints/{time.time()}").write_text("")

  with destination.new_folder(sys.argv[1]) as folder:
    (folder / "half").write_text("")
    if sys.argv[2:]:
      threading.Thread(target=save, args=(folder,), daemon=True).start()
    print("writing", flush=True)
    time.sleep(600)
""")


def writing(output: pathlib.Path, *args: str) -> subprocess.Popen:
  """Returns a process that is writing a folder and does not end."""
  command = [sys.executable, "-c", WRITE, str(output), *args]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  assert process.stdout and process.stdout.readline() == "writing\n"
  return process


def test_the_partial_folder_of_a_killed_process_is_removed_by_the_next(tmp_path):
  with writing(tmp_path / "out") as process:
    process.kill()
  (left,) = tmp_path.iterdir()
  assert left.name.startswith(".out.")
  with destination.new_folder(str(tmp_path / "out")) as folder:
    assert not left.exists() and folder.name == "out"
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folders_in_use_and_folders_of_others_are_left_alone(tmp_path):
  own = tmp_path / ".out.notes"
  own.mkdir()
  with writing(tmp_path / "out") as process:
    (locked_folder,) = set(tmp_path.iterdir()) - {own}
    with destination.new_folder(str(tmp_path / "out")):
      pass
    assert (locked_folder / "out/half").exists() and own.exists()
    process.kill()


@pytest.mark.parametrize("busy", [(), ("busy",)], ids=["idle", "a thread writes"])
def test_ctrl_c_is_one_word_and_leaves_nothing(busy, tmp_path):
  with writing(tmp_path / "out", *busy) as process:
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
  assert (process.returncode, complaint) == (errors.EXIT_INTERRUPTED, "interrupted\n")
  left = [path for path in tmp_path.iterdir() if not busy or any(path.glob("out/half"))]
  assert not left  # The next run removes what threads write until the process has ended.
  with destination.new_folder(str(tmp_path / "out")):
    pass
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_while_jax_is_imported_is_one_word(tmp_path):
  (tmp_path / "jax").mkdir()
  (tmp_path / "jax/__init__.py").write_text(
    "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
  )
  code = f"{HANDLE_CTRL_C}import runpy; runpy.run_module('calm_jax.convert', run_name='__main__')"
  paths = os.pathsep.join([str(tmp_path), str(pathlib.Path(__file__).parent.parent)])
  done = subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | {"PYTHONPATH": paths},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (done.returncode, done.stderr) == (errors.EXIT_INTERRUPTED, "interrupted\n")


def test_an_exception_leaves_nothing(tmp_path):
  with pytest.raises(KeyError), destination.new_folder(str(tmp_path / "out")) as folder:
    (folder / "half").write_text("")
    raise KeyError
  assert not list(tmp_path.iterdir())


def test_a_lock_that_can_not_be_made_leaves_nothing(tmp_path, monkeypatch):
  def fails(self, target):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(pathlib.Path, "rename", fails)
  with (
    pytest.raises(errors.CalmError, match=r"can't write --output=.*No space left"),
    destination.new_folder(str(tmp_path / "out")),
  ):
    pass
  assert not list(tmp_path.iterdir())
