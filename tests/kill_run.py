"""Kills a short run repeatedly, by SIGKILL at random moments, and checks its result.

    python tests/kill_run.py --kills=30

Half of the kills happen during a save. The finished run must equal an uninterrupted run bit for
bit: its parameters, its optimizer state, and the figures of every step, each exactly once, so that
no batch is lost or repeated. Prints a report as JSON and exits with 1 at any difference.
"""

import collections
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

from absl import app, flags

_KILLS = flags.DEFINE_integer("kills", 30, "Number of kills.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the moments.")

ROOT = pathlib.Path(__file__).parent.parent
CHECKPOINT_EVERY, STEPS_PER_KILL = 20, 60
# Figures of a report that depend on the clock.
TIMED = {"time", "seconds", "data_wait_share", "tokens_per_second", "patches_per_second"}


def command(directory: pathlib.Path, steps: int) -> list[str]:
  """Returns the command of a run of stage one, so small that a step takes milliseconds."""
  settings = {
    "data.path": "synthetic:300",
    "data.context": 32,
    "model.width": 16,
    "model.ffn": 32,
    "model.latent": 8,
    "model.init": "fan_in",
    "training.steps": steps,
    "training.batch": 4,
    "training.compute_dtype": "float32",
    "training.log_every": 1,
    "training.eval_every": 3 * CHECKPOINT_EVERY,
    "training.eval_blocks": 4,
    "training.checkpoint_every": CHECKPOINT_EVERY,
    "mesh.fsdp": 1,
    "optimizer.warmup_steps": 2,
  }
  flags = [f"--config.{name}={value}" for name, value in settings.items()]
  act = [sys.executable, "-m", "calm_jax.main", "--config=configs/autoencoder.py"]
  return [*act, f"--workdir={directory}", *flags]


def start(directory: pathlib.Path, steps: int, cache: pathlib.Path) -> subprocess.Popen:
  """Starts an attempt; a compilation cache makes it spend most of its time in steps and saves."""
  cached = {
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  return subprocess.Popen(
    command(directory, steps),
    cwd=ROOT,
    env=os.environ | cached,
    stderr=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    text=True,
    start_new_session=True,
  )


def last_step(directory: pathlib.Path) -> int:
  """Returns the last step whose figures were written, 0 for none."""
  try:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["step"] if lines else 0
  except (OSError, ValueError):
    return 0


def saving(directory: pathlib.Path) -> bool:
  """Returns whether there is a partial checkpoint, of this attempt or of a killed one."""
  return any("tmp" in path.name for path in (directory / "checkpoints").glob("*"))


def kill_one(process: subprocess.Popen, directory: pathlib.Path, choice: random.Random) -> str:
  """Kills an attempt and returns what it was doing; "" if it ended before."""
  in_save = choice.random() < 0.5
  least_step = last_step(directory) + choice.randint(1, STEPS_PER_KILL)
  early = choice.random() < 0.2
  until, start_step = time.monotonic() + choice.uniform(0.2, 4), last_step(directory)
  while process.poll() is None:
    at = last_step(directory)
    # Before the first step a partial checkpoint is a leftover, which the start removes.
    moment = "startup" if at == start_step else "save" if saving(directory) else "step"
    if early and time.monotonic() > until:
      break
    if not early and at >= least_step and moment == ("save" if in_save else "step"):
      break
    time.sleep(0.001)
  else:
    return ""
  os.killpg(process.pid, signal.SIGKILL)
  return moment


def figures(directory: pathlib.Path) -> list[dict]:
  """Returns the reports of a run without figures that depend on the clock."""
  records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
  return [{name: x for name, x in record.items() if name not in TIMED} for record in records]


def fingerprints(directory: pathlib.Path, step: int) -> dict:
  """Returns the fingerprints of a checkpoint and its data position."""
  folder = directory / "checkpoints" / str(step) / "meta"
  (file,) = [path for path in folder.iterdir() if path.name == "metadata"]
  meta = json.loads(file.read_text())
  return {name: meta[name] for name in ("params_fingerprint", "rest_fingerprint", "data")}


def run(kills: int, seed: int, root: pathlib.Path) -> dict:
  """Runs both runs and returns the report."""
  steps, choice = kills * STEPS_PER_KILL, random.Random(seed)
  alone, killed, cache = root / "alone", root / "killed", root / "cache"
  process = start(alone, steps, cache)
  stderr = process.communicate()[1]
  assert process.returncode == 0, stderr
  moments: collections.Counter[str] = collections.Counter()
  resumed_after, ended = [], False
  while not ended:
    process = start(killed, steps, cache)
    moment = kill_one(process, killed, choice) if sum(moments.values()) < kills else ""
    stderr, ended = process.communicate()[1], not moment
    assert not ended or process.returncode == 0, stderr
    if moment:
      moments[moment] += 1
    if resumed := re.search(r"resuming after step (\d+)", stderr):
      resumed_after.append(int(resumed[1]))
  actual, expected = figures(killed), figures(alone)
  order = [(record["kind"], record["step"]) for record in actual]
  return {
    "steps": steps,
    "kills": sum(moments.values()),
    "moments": dict(moments),
    "resumed_after": resumed_after,
    "each_step_once": sorted(order) == sorted((r["kind"], r["step"]) for r in expected),
    "figures_equal": sorted(map(json.dumps, actual)) == sorted(map(json.dumps, expected)),
    "state_equal": fingerprints(killed, steps) == fingerprints(alone, steps),
  }


def main(_) -> None:
  with tempfile.TemporaryDirectory() as root:
    began = time.monotonic()
    report = run(_KILLS.value, _SEED.value, pathlib.Path(root))
  print(json.dumps({**report, "seconds": round(time.monotonic() - began)}, indent=2))
  sys.exit(not all(report[name] for name in ("each_step_once", "figures_equal", "state_equal")))


if __name__ == "__main__":
  app.run(main)
