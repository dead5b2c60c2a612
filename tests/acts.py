"""Runs acts as commands, each in a fork of one process that has imported what they share.

A process that imports JAX takes a second or more, a fork a hundredth of it. An act is run
as `python -m` does, up to `cli.run`, and then once for each command line.

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
  "prepare", "main", "evaluate", "generate", "report", "convert", "benchmark", "cost",
  "compile_ahead",
)  # fmt: skip

# None of ours that defines flags.
SHARED = (
  "calm_jax.settings", "flax.linen", "grain", "jax", "matplotlib.pyplot", "optax",
  "orbax.checkpoint", "scipy.stats", "sentencepiece", "tensorstore", "tokenizers",
)  # fmt: skip

Ended = tuple[int, str, str]


def run(commands: dict[str, list[list[str]]], cwd: str) -> dict[str, list[Ended]]:
  """The exit code and both outputs of each command line of each act."""
  done = subprocess.run(
    [sys.executable, __file__], cwd=cwd, input=json.dumps(commands), capture_output=True, text=True,
    env=os.environ | {"PYTHONPATH": cwd}, timeout=300, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def _forked(act, *files) -> int:
  """The exit code of `act` in a process of its own that writes its outputs to two files."""
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
  """How an act ends that is run with these words."""

  def with_words() -> None:
    sys.argv[1:] = words
    act()

  with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
    code = _forked(with_words, out, err)
    for file in (out, err):
      file.seek(0)
    return code, out.read(), err.read()


def _serve(name: str, commands: list[list[str]], answers: str) -> None:
  """Runs an act with each of the command lines; writes how they end."""
  from calm_jax import cli

  run_act = cli.run

  def each(main) -> None:
    ended = [_ended(lambda: run_act(main), words) for words in commands]
    with open(answers, "w") as file:
      json.dump(ended, file)

  cli.run = each
  sys.argv = [name]
  runpy.run_module(f"calm_jax.{name}", run_name="__main__", alter_sys=True)


def _main() -> None:
  for name in SHARED:
    importlib.import_module(name)
  commands, found = json.load(sys.stdin), {}
  with tempfile.TemporaryDirectory() as folder:
    for name, lines in commands.items():
      answers = f"{folder}/{name}"
      code = _forked(functools.partial(_serve, name, lines, answers))
      assert code == 0, name
      with open(answers) as file:
        found[name] = json.load(file)
  json.dump(found, sys.stdout)


if __name__ == "__main__":
  _main()
