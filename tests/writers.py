"""Starts pairs of the same command on one output, and counts what they do to each other.

    python tests/writers.py --pairs=30 --kind=prepare|main|generate

One of a pair must do its work as if it were alone; the other is refused in one line, or finds
the work done. What is left must equal what one alone leaves, and be gone on with. Half of the
pairs start at the same moment. Prints a report as JSON and exits with 1 where anything differs.
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
  "data.context": 32, "model.layers": 1, "model.width": 16, "model.ffn": 32, "model.heads": 2,
  "model.kv_heads": 1, "training.steps": 2, "training.batch": 4, "training.eval_every": 0,
  "mesh.fsdp": 1, "optimizer.warmup_steps": 1,
}  # fmt: skip

Command = list[str]
# From a folder for what is shared: the command for an output; what goes on with it, if anything;
# what is left of it, to be compared.
Kind = tuple[
  Callable[[pathlib.Path], Command],
  Callable[[pathlib.Path], Command | None],
  Callable[[pathlib.Path], object],
]


def act(name: str, *words: str) -> Command:
  return [sys.executable, "-m", f"calm_jax.{name}", *words]


def start(command: Command, root: pathlib.Path) -> subprocess.Popen:
  """Starts a command; nothing is compiled twice."""
  cached = {
    "JAX_COMPILATION_CACHE_DIR": f"{root}/cache",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  return subprocess.Popen(
    command, cwd=kill_run.ROOT, env=os.environ | cached, stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def done(command: Command, root: pathlib.Path) -> None:
  process = start(command, root)
  said = process.communicate(timeout=300)[1]
  assert process.returncode == 0, said


def prepare(root: pathlib.Path) -> Kind:
  lines = [
    json.dumps({"text": f"{i} cats said {'meow, ' * (i % 9)}then ate."}) for i in range(DOCUMENTS)
  ]
  (root / "cats.jsonl").write_text("\n".join(lines))

  def command(output: pathlib.Path) -> Command:
    given = (f"--input={root}/cats.jsonl", "--tokenizer=train:300", "--heldout=0.1")
    return act("prepare", f"--output={output}", *given)

  def left(output: pathlib.Path) -> object:
    store = store_lib.TokenStore.open(str(output))
    tokens = {x: store.read(x, 0, store.num_tokens(x)).tobytes() for x in store_lib.SPLITS}
    offsets = {x: store.offsets(x).tobytes() for x in store_lib.SPLITS}
    names = sorted(str(path.relative_to(output)) for path in output.rglob("*"))
    return store.hash, tokens, offsets, names

  return command, lambda output: None, left


def main_act(root: pathlib.Path) -> Kind:
  def more(output: pathlib.Path) -> Command:
    return [*kill_run.command(output, STEPS + MORE), "--allow_config_change"]

  def left(output: pathlib.Path) -> object:
    found = sorted(map(json.dumps, kill_run.figures(output)))
    names = sorted(path.name for path in output.iterdir() if path.name != "ledger")
    return found, kill_run.fingerprints(output, STEPS + MORE), names

  return lambda output: kill_run.command(output, STEPS), more, left


def generate(root: pathlib.Path) -> Kind:
  done(prepare(root)[0](root / "tokens"), root)
  given = [f"--config.{name}={value}" for name, value in TINY.items()]
  model = act("main", "--config=configs/transformer.py", f"--workdir={root}/model", *given)
  done([*model, f"--config.data.path={root}/tokens"], root)
  lines = [json.dumps({"prompt": f"{i} cats", "seed": i}) for i in range(TEXTS)]
  (root / "prompts.jsonl").write_text("\n".join(lines))

  def command(output: pathlib.Path) -> Command:
    given = (f"--workdir={root}/model", f"--prompts={root}/prompts.jsonl", "--max_tokens=32")
    return act("generate", f"--output={output}", *given, "--batch=1")

  def left(output: pathlib.Path) -> object:
    beside = sorted(path.name.removeprefix(output.name) for path in output.parent.glob("*.lease*"))
    return output.read_text(), beside

  return command, lambda output: None, left


KINDS = {"prepare": prepare, "main": main_act, "generate": generate}


def outcome(process: subprocess.Popen) -> str:
  """What became of one of a pair."""
  said, code = process.communicate(timeout=300)[1], process.returncode
  last = said.splitlines()[-1] if said else ""
  if "Traceback" in said or code not in (0, 2):
    return f"ended with {code}: {last}"
  if code == 0:
    return "done"
  refused = last.startswith("error: ") and "is being written by process" in last
  return "refused" if refused and said.count("error: ") == 1 else f"ended with 2: {last}"


def compared(left: Callable[[pathlib.Path], object], output: pathlib.Path, expected: object) -> str:
  """Tells how what is left of a pair differs, nothing where it does not."""
  try:
    return "" if left(output) == expected else "another result"
  except Exception as error:
    return f"{type(error).__name__}: {error}"[:200]


def run(kind: str, pairs: int, seed: int, root: pathlib.Path) -> dict:
  """Returns the report."""
  command, more, left = KINDS[kind](root)
  alone, choice = root / "alone", random.Random(seed)
  done(command(alone), root)
  began = time.monotonic()
  done(command(root / "timed"), root)
  seconds = time.monotonic() - began
  if follow := more(alone):
    done(follow, root)
  expected = left(alone)
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
    if not problem and (follow := more(output)):
      problem = outcome(start(follow, root)).removeprefix("done")
    problem = "; ".join(filter(None, (problem, compared(left, output, expected))))
    if problem:
      harmed.append(problem)
  return {"kind": kind, "pairs": pairs, "outcomes": dict(outcomes), "harmed": harmed}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--pairs", type=int, default=30, help="how many are started")
  parser.add_argument("--kind", choices=KINDS, default="prepare", help="what is started twice")
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  given = parser.parse_args()
  with tempfile.TemporaryDirectory() as root:
    began = time.monotonic()
    report = run(given.kind, given.pairs, given.seed, pathlib.Path(root))
  print(json.dumps({**report, "seconds": round(time.monotonic() - began)}, indent=2))
  sys.exit(bool(report["harmed"]))


if __name__ == "__main__":
  main()
