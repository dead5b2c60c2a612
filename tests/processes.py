"""Helpers of tests that start processes: start, wait for and check commands."""

import os
import pathlib
import subprocess
import time

ROOT = pathlib.Path(__file__).parent.parent

# Counts the signals NAME in a file with the name of its process id; exits with 75 after the first.
ON_SIGNAL = """
import pathlib, signal, sys, time
own = pathlib.Path(sys.argv[1]) / sys.argv[-1].split("=")[1]
seen = []
signal.signal(signal.NAME, lambda *_: seen.append(1))
own.touch()
while not seen:
  time.sleep(0.02)
time.sleep(0.3)
own.write_text(f"seen {len(seen)}")
sys.exit(75)
"""


def start(*words: object, **environment: str) -> subprocess.Popen:
  """Starts a command in the root of the checkout."""
  return subprocess.Popen(
    [str(word) for word in words],
    cwd=ROOT,
    env=os.environ | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
  """Waits for a process and returns its exit code, standard output and standard error."""
  output, errors = process.communicate(timeout=60)
  return process.returncode, output, errors


def wait_for(path: pathlib.Path) -> None:
  """Waits until a path exists, at most 30 seconds."""
  deadline = time.monotonic() + 30
  while not path.exists():
    assert time.monotonic() < deadline, path
    time.sleep(0.02)


def refused(words: tuple[object, ...], reason: str, **environment: str) -> None:
  """Asserts that a command exits with 2 and one line that holds `reason`."""
  code, output, errors = finish(start(*words, **environment))
  assert code == 2 and not output
  assert errors.startswith("error: ") and errors.count("\n") == 1 and reason in errors
