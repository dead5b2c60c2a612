"""Runs acts as commands, each in a fork of one process that has imported the shared modules.

A new process needs a second or more to import JAX, a fork a hundredth of that. An act runs like
with `python -m` up to `cli.run`, and then once per command line.

  python tests/acts.py < {"ACT": [["--flag=value"], ...]} > {"ACT": [[code, out, err], ...]}
"""

import functools
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback

ACTS = (
  "prepare",
  "main",
  "evaluate",
  "generate",
  "report",
  "convert",
  "benchmark",
  "cost",
  "compile_ahead",
)

# Modules to import before the forks; none of ours that defines flags.
SHARED = (
  "calm_jax.settings",
  "flax.linen",
  "grain",
  "jax",
  "matplotlib.pyplot",
  "optax",
  "orbax.checkpoint",
  "scipy.stats",
  "sentencepiece",
  "tensorstore",
  "tokenizers",
)

Ended = tuple[int, str, str]  # Exit code, standard output, standard error.


def run(commands: dict[str, list[list[str]]], cwd: str) -> dict[str, list[Ended]]:
  """Returns how each command line of each act ends."""
  done = subprocess.run(
    [sys.executable, __file__],
    cwd=cwd,
    input=json.dumps(commands),
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": cwd},
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def _forked(act, *files) -> int:
  """Runs `act` in a fork that writes its outputs to two files; returns the exit code."""
  sys.stdout.flush()
  child = os.fork()
  if child:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  code = 1
  try:
    for number, file in enumerate(files, 1):
      os.dup2(file.fileno(), number)
    act()
    code = 0
  except SystemExit as ended:
    code = ended.code or 0
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _ended(act, words: list[str]) -> Ended:
  """Returns how an act ends with these words."""

  def with_words() -> None:
    sys.argv[1:] = words
    act()

  with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
    code = _forked(with_words, out, err)
    for file in (out, err):
      file.seek(0)
    return code, out.read(), err.read()


def _serve(name: str, commands: list[list[str]], answers: str) -> None:
  """Runs an act with each of the command lines and writes how they end to a file."""
  from calm_jax import cli

  run_act = cli.run

  def run_all(main) -> None:
    ended = [_ended(lambda: run_act(main), words) for words in commands]
    with open(answers, "w") as file:
      json.dump(ended, file)

  cli.run = run_all
  sys.argv = [name]
  runpy.run_module(f"calm_jax.{name}", run_name="__main__", alter_sys=True)


def _main() -> None:
  for name in SHARED:
    importlib.import_module(name)
  commands, results = json.load(sys.stdin), {}
  with tempfile.TemporaryDirectory() as folder:
    for name, lines in commands.items():
      answers = f"{folder}/{name}"
      code = _forked(functools.partial(_serve, name, lines, answers))
      assert code == 0, name
      with open(answers) as file:
        results[name] = json.load(file)
  json.dump(results, sys.stdout)


if __name__ == "__main__":
  _main()
