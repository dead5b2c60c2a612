"""Claims about several processes: they compute what one does, stop together, go on as others.

Real processes on this machine, through launch/local_processes.py.
"""

import json
import os
import pathlib
import re
import signal
import sys
import time

import jax
import numpy as np
import pytest
from processes import start
from test_local_processes import local_processes as launcher

from calm_jax import errors, lease, workdir
from calm_jax.running import loading

DEVICES = 4
STEPS = 6
SETTINGS = dict(
  data=dict(path="synthetic:300", context=32),
  model=dict(width=32, ffn=64, latent=8, init="fan_in"),
  optimizer=dict(warmup_steps=2, learning_rate=3e-3),
  training=dict(
    steps=STEPS, batch=8, compute_dtype="float32", log_every=1, eval_every=3, eval_blocks=6,
    checkpoint_every=2, keep_latest=9,
  ),
)  # fmt: skip


def flags(directory: pathlib.Path, **changes) -> list[str]:
  """The command's settings and workdir; `changes` are of training, or by their whole name."""
  given = {f"{part}.{name}": x for part, group in SETTINGS.items() for name, x in group.items()}
  given |= {name.replace("__", ".") if "__" in name else f"training.{name}": x
            for name, x in changes.items()}  # fmt: skip
  settings = [f"--config.{name}={value}" for name, value in given.items()]
  return ["--config=configs/autoencoder.py", f"--workdir={directory}", *settings]


def command(processes: int, *words: str, grace: int = 60) -> list[str]:
  """`words` as so many processes, the devices shared out."""
  launcher = [
    sys.executable, "launch/local_processes.py", f"--processes={processes}",
    f"--devices={DEVICES // processes}", f"--grace_seconds={grace}", "--",
  ]  # fmt: skip
  return [*launcher, sys.executable, "-m", "calm_jax.main", *words]


def ran(processes: int, *words: str, expected: int = 0) -> str:
  """Runs to the end and returns what was printed on standard error."""
  process = start(*command(processes, *words))
  _, said = process.communicate(timeout=200)
  assert process.returncode == expected, said
  return said


def records(directory: pathlib.Path, kind: str = "train") -> list[dict]:
  lines = (directory / workdir.METRICS).read_text().splitlines()
  return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(directory: pathlib.Path) -> list[float]:
  return [record["loss"] for record in records(directory)]


def params(directory: pathlib.Path) -> list[np.ndarray]:
  trained = loading.load(str(directory))
  assert trained.step == STEPS
  return [np.asarray(leaf) for leaf in jax.tree.leaves(trained.params)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The workdir of an uninterrupted run of one process."""
  directory = tmp_path_factory.mktemp("whole") / "run"
  ran(1, *flags(directory))
  return directory


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
  """The workdir of an uninterrupted run of four processes, and what they printed."""
  directory = tmp_path_factory.mktemp("four") / "run"
  return directory, ran(4, *flags(directory))


def assert_same(a: pathlib.Path, b: pathlib.Path) -> None:
  """The mesh is the same whoever has its devices, and so is every number but for rounding.

  Processes add in another order, and Adam makes a step of a tiny gradient's last digits: of
  18e-3 that a parameter can move in all.
  """
  assert [record["step"] for record in records(a)] == list(range(1, STEPS + 1))
  np.testing.assert_allclose(losses(a), losses(b), rtol=1e-6)
  for x, y in zip(params(a), params(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_four_processes_compute_what_one_does(of_four, whole):
  directory, said = of_four
  assert_same(directory, whole)
  for name in ("token_accuracy", "cross_entropy"):
    np.testing.assert_allclose(
      [record[name] for record in records(directory, "evaluation")],
      [record[name] for record in records(whole, "evaluation")],
      rtol=1e-5,
    )
  told = re.findall(
    r"process (\d) of 4: 1 of 4 devices \(cpu\), slice 0, jax \S+, config (\w+)", said
  )
  assert sorted(index for index, _ in told) == ["0", "1", "2", "3"]
  assert len({config for _, config in told}) == 1
  assert said.count("train 3/6") == 1  # Process 0 alone tells the figures.


def test_a_run_goes_on_with_another_number_of_processes(whole, tmp_path: pathlib.Path):
  """Four processes begin, one goes on, two end; and on another mesh."""
  directory = tmp_path / "run"
  ran(4, *flags(directory, steps=2), "--allow_config_change")
  ran(1, *flags(directory, steps=4, mesh__data=2, mesh__fsdp=2), "--allow_config_change")
  ran(2, *flags(directory), "--allow_config_change")
  assert_same(directory, whole)


def test_a_workdir_in_use_is_refused_by_all_processes(tmp_path: pathlib.Path):
  directory = tmp_path / "run"
  with lease.Lease(lease.of_folder(directory), f"--workdir={directory}"):
    said = ran(2, *flags(directory), expected=errors.EXIT_BAD_INPUT)
  refusals = [line for line in said.splitlines() if "is being written by process" in line]
  assert len(refusals) == 2 and "Traceback" not in said
  assert not directory.exists()


def started(processes: int, directory: pathlib.Path, *words: str, **changes):
  return start(*command(processes, *flags(directory, **changes), *words))


def wait_for_step(directory: pathlib.Path, step: int) -> None:
  deadline = time.monotonic() + 100
  while not (directory / workdir.METRICS).exists() or len(losses(directory)) < step:
    assert time.monotonic() < deadline
    time.sleep(0.02)


def test_sigterm_saves_one_step_for_all_and_asks_for_another_start(tmp_path: pathlib.Path):
  directory = tmp_path / "run"
  process = started(2, directory, steps=100_000, eval_every=0, checkpoint_every=100_000)
  wait_for_step(directory, 3)
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=60)
  assert process.returncode == errors.EXIT_RESTART, said
  (step,) = [int(path.name) for path in (directory / "checkpoints").iterdir()]
  assert f"SIGTERM: saved step {step}; the same command resumes from it" in said
  assert [record["step"] for record in records(directory)] == list(range(1, step + 1))


def pids(process) -> list[int]:
  """The launched processes, by their number."""
  children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
  number = {}
  for child in map(int, children):
    words = pathlib.Path(f"/proc/{child}/cmdline").read_text().split("\0")
    found = [word for word in words if word.startswith("--process_id=")]
    number[int(found[0].split("=")[1])] = child
  return [number[index] for index in sorted(number)]


def test_one_dead_of_four_stops_the_others_and_the_restarted_job_goes_on(tmp_path: pathlib.Path):
  directory = tmp_path / "run"
  process = started(
    4, directory, "--heartbeat_timeout=6", steps=100_000, eval_every=0, checkpoint_every=2
  )
  wait_for_step(directory, 5)
  os.kill(pids(process)[2], signal.SIGKILL)
  killed = time.monotonic()
  _, said = process.communicate(timeout=90)
  assert process.returncode == errors.EXIT_RESTART, said
  assert time.monotonic() - killed < 40
  assert re.search(r"process \d of 4: process 2 has shown no sign of life for \d+ s", said)
  newest = max(int(path.name) for path in (directory / "checkpoints").iterdir())
  changed = dict(steps=newest + 3, eval_every=0, checkpoint_every=2)
  assert f"resuming after step {newest}" in ran(
    4, *flags(directory, **changed), "--allow_config_change"
  )
  ran(1, *flags(tmp_path / "alone", **changed))
  assert len(losses(directory)) == newest + 3
  np.testing.assert_allclose(losses(directory), losses(tmp_path / "alone"), rtol=1e-5)


# A process whose second reads hang, so that it can take part in void steps alone.
HANGING = """
import sys, time
from calm_jax import cli, main
from calm_jax.data import pipeline
read, taken = pipeline.TrainingBatches.__next__, []
def hangs(self):
  taken.append(1)
  if len(taken) > 4 and "--process_id=1" in sys.argv:
    time.sleep(1000)
  return read(self)
pipeline.TrainingBatches.__next__ = hangs
cli.run(main.main)
"""


def test_a_process_without_data_stops_all_at_the_last_step_that_all_took(tmp_path: pathlib.Path):
  directory = tmp_path / "run"
  words = [sys.executable, "-c", HANGING, *flags(directory, eval_every=0, checkpoint_every=100)]
  process = start(*command(2)[:-3], *words)
  wait_for_step(directory, 3)
  time.sleep(1)
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=60)
  assert process.returncode == errors.EXIT_RESTART, said
  assert "SIGTERM: saved step 4;" in said
  changed = dict(eval_every=0, checkpoint_every=100)
  ran(2, *flags(directory, **changed))
  ran(1, *flags(tmp_path / "alone", **changed))
  assert [record["step"] for record in records(directory)] == list(range(1, STEPS + 1))
  np.testing.assert_allclose(losses(directory), losses(tmp_path / "alone"), rtol=1e-5)


def each_says(said: str, processes: int, message: str) -> None:
  for index in range(processes):
    lines = [line for line in said.splitlines() if line.startswith(f"[{index}] error:")]
    assert len(lines) == 1 and message in lines[0], said


def test_bad_input_of_all_is_told_by_each(tmp_path: pathlib.Path):
  said = ran(2, *flags(tmp_path / "run", mesh__fsdp=3), expected=errors.EXIT_BAD_INPUT)
  each_says(said, 2, "needs a multiple of 3 devices and there are 4: change --config.mesh.fsdp")
  said = ran(2, *flags(tmp_path / "run", batch=6), expected=errors.EXIT_BAD_INPUT)
  each_says(said, 2, "must be a multiple of accumulation * data * fsdp = 4 on this mesh, got 6")
  assert not (tmp_path / "run").exists()


def apart(tmp_path: pathlib.Path, *words: list[str]) -> list[tuple[int, str]]:
  """Processes of one job with words of their own: the exit code and errors of each."""
  address = f"127.0.0.1:{launcher.free_port()}"
  processes = [
    start(
      sys.executable, "-m", "calm_jax.main", *own, f"--coordinator_address={address}",
      f"--num_processes={len(words)}", f"--process_id={index}",
      XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    for index, own in enumerate(words)
  ]  # fmt: skip
  return [(process.wait(100), process.communicate()[1]) for process in processes]


def test_processes_with_different_configs_refuse_within_a_minute(tmp_path: pathlib.Path):
  began = time.monotonic()
  found = apart(tmp_path, flags(tmp_path / "run"), flags(tmp_path / "run", seed=1))
  assert time.monotonic() - began < 60
  for code, said in found:
    assert code == errors.EXIT_BAD_INPUT
    assert re.search(r"error: process 0 has config \w{8}, process 1 has \w{8}: start all", said)


def test_an_error_of_one_process_is_told_by_the_others(tmp_path: pathlib.Path):
  words = flags(tmp_path / "run")
  broken = [w.replace("synthetic:300", str(tmp_path / "nothing")) for w in words]
  for index, (code, said) in enumerate(apart(tmp_path, words, broken)):
    assert code == errors.EXIT_BAD_INPUT
    assert ("error: process 1: no such token" if index == 0 else "error: no such token") in said


def test_a_missing_process_is_told_by_those_that_came(tmp_path: pathlib.Path):
  address = f"--coordinator_address=127.0.0.1:{launcher.free_port()}"
  words = [*flags(tmp_path / "run"), address, "--num_processes=2", "--initialization_timeout=5"]
  process = start(sys.executable, "-m", "calm_jax.main", *words, "--process_id=0")
  _, said = process.communicate(timeout=60)
  assert process.returncode == errors.EXIT_RESTART, said
  assert "not all 2 processes came within --initialization_timeout=5 s" in said
