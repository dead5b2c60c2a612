"""Starts pairs of the same command on one output, and checks that they do not disturb each other.

    python tests/writers.py --pairs=30 --kind=prepare|main|generate

One of a pair must work as if it were alone; the other must be refused in one line, or find the work
done. The output must equal that of a single command, and the next command must accept it. Half of
the pairs start simultaneously. Prints a report as JSON and exits with 1 at any difference.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import kill_run

from calm_jax.data import store as store_lib

DOCUMENTS, TEXTS = 60_000, 6
STEPS, MORE = 60, 20
TINY = {
  "data.context": 32,
  "model.layers": 1,
  "model.width": 16,
  "model.ffn": 32,
  "model.heads": 2,
  "model.kv_heads": 1,
  "training.steps": 2,
  "training.batch": 4,
  "training.eval_every": 0,
  "mesh.fsdp": 1,
  "optimizer.warmup_steps": 1,
}

Command = list[str]
# Functions of an output: its command, the next command on it (None for none), and its content,
# to be compared.
Kind = tuple[
  Callable[[pathlib.Path], Command],
  Callable[[pathlib.Path], Command | None],
  Callable[[pathlib.Path], object],
]


def act(name: str, *words: str) -> Command:
  return [sys.executable, "-m", f"calm_jax.{name}", *words]


def start(command: Command, root: pathlib.Path) -> subprocess.Popen:
  """Starts a command with a shared compilation cache."""
  cached = {
    "JAX_COMPILATION_CACHE_DIR": f"{root}/cache",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  return subprocess.Popen(
    command,
    cwd=kill_run.ROOT,
    env=os.environ | cached,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def run_alone(command: Command, root: pathlib.Path) -> None:
  """Runs a command to its end and asserts its success."""
  process = start(command, root)
  stderr = process.communicate(timeout=300)[1]
  assert process.returncode == 0, stderr


def prepare(root: pathlib.Path) -> Kind:
  """Returns the functions for a token store."""
  lines = [
    json.dumps({"text": f"{i} cats said {'meow, ' * (i % 9)}then ate."}) for i in range(DOCUMENTS)
  ]
  (root / "cats.jsonl").write_text("\n".join(lines))

  def command(output: pathlib.Path) -> Command:
    flags = (f"--input={root}/cats.jsonl", "--tokenizer=train:300", "--heldout=0.1")
    return act("prepare", f"--output={output}", *flags)

  def content(output: pathlib.Path) -> object:
    store = store_lib.TokenStore.open(str(output))
    tokens = {x: store.read(x, 0, store.num_tokens(x)).tobytes() for x in store_lib.SPLITS}
    offsets = {x: store.offsets(x).tobytes() for x in store_lib.SPLITS}
    names = sorted(str(path.relative_to(output)) for path in output.rglob("*"))
    return store.hash, tokens, offsets, names

  return command, lambda output: None, content


def main_act(root: pathlib.Path) -> Kind:
  """Returns the functions for a workdir."""

  def following(output: pathlib.Path) -> Command:
    return [*kill_run.command(output, STEPS + MORE), "--allow_config_change"]

  def content(output: pathlib.Path) -> object:
    figures = sorted(map(json.dumps, kill_run.figures(output)))
    names = sorted(path.name for path in output.iterdir() if path.name != "ledger")
    return figures, kill_run.fingerprints(output, STEPS + MORE), names

  return lambda output: kill_run.command(output, STEPS), following, content


def generate(root: pathlib.Path) -> Kind:
  """Returns the functions for a file of texts."""
  run_alone(prepare(root)[0](root / "tokens"), root)
  flags = [f"--config.{name}={value}" for name, value in TINY.items()]
  model = act("main", "--config=configs/transformer.py", f"--workdir={root}/model", *flags)
  run_alone([*model, f"--config.data.path={root}/tokens"], root)
  lines = [json.dumps({"prompt": f"{i} cats", "seed": i}) for i in range(TEXTS)]
  (root / "prompts.jsonl").write_text("\n".join(lines))

  def command(output: pathlib.Path) -> Command:
    flags = (f"--workdir={root}/model", f"--prompts={root}/prompts.jsonl", "--max_tokens=32")
    return act("generate", f"--output={output}", *flags, "--batch=1")

  def content(output: pathlib.Path) -> object:
    leases = sorted(path.name.removeprefix(output.name) for path in output.parent.glob("*.lease*"))
    return output.read_text(), leases

  return command, lambda output: None, content


KINDS = {"prepare": prepare, "main": main_act, "generate": generate}


def outcome(process: subprocess.Popen) -> str:
  """Waits for a command of a pair and returns how it ended."""
  stderr, code = process.communicate(timeout=300)[1], process.returncode
  last = stderr.splitlines()[-1] if stderr else ""
  if "Traceback" in stderr or code not in (0, 2):
    return f"ended with {code}: {last}"
  if code == 0:
    return "done"
  refused = last.startswith("error: ") and "is being written by process" in last
  return "refused" if refused and stderr.count("error: ") == 1 else f"ended with 2: {last}"


def difference(
  content: Callable[[pathlib.Path], object], output: pathlib.Path, expected: object
) -> str:
  """Returns how the output of a pair differs from `expected`, "" if it does not."""
  try:
    return "" if content(output) == expected else "another result"
  except Exception as error:
    return f"{type(error).__name__}: {error}"[:200]


def run(kind: str, pairs: int, seed: int, root: pathlib.Path) -> dict:
  """Runs the pairs and returns the report."""
  command, following, content = KINDS[kind](root)
  alone, choice = root / "alone", random.Random(seed)
  run_alone(command(alone), root)
  began = time.monotonic()
  run_alone(command(root / "timed"), root)
  seconds = time.monotonic() - began
  if next_command := following(alone):
    run_alone(next_command, root)
  expected = content(alone)
  outcomes: collections.Counter[str] = collections.Counter()
  harmed = []
  for number in range(pairs):
    output = root / f"pair{number}"
    first = start(command(output), root)
    time.sleep(choice.choice((0, choice.uniform(0, 0.6 * seconds))))
    second = start(command(output), root)
    ended = sorted(map(outcome, (first, second)))
    outcomes[" + ".join(ended)] += 1
    problem = "" if ended in (["done", "refused"], ["done", "done"]) else " + ".join(ended)
    if not problem and (next_command := following(output)):
      problem = outcome(start(next_command, root)).removeprefix("done")
    problem = "; ".join(filter(None, (problem, difference(content, output, expected))))
    if problem:
      harmed.append(problem)
  return {"kind": kind, "pairs": pairs, "outcomes": dict(outcomes), "harmed": harmed}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--pairs", type=int, default=30, help="number of pairs")
  parser.add_argument("--kind", choices=KINDS, default="prepare", help="act of the command")
  parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as root:
    began = time.monotonic()
    report = run(flags.kind, flags.pairs, flags.seed, pathlib.Path(root))
  print(json.dumps({**report, "seconds": round(time.monotonic() - began)}, indent=2))
  sys.exit(bool(report["harmed"]))


if __name__ == "__main__":
  main()
