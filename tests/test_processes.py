"""Claims about several processes: they compute the same as one, and stop and resume together.

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
  """Returns flags; `changes` are training settings, or full names with __ instead of dots."""
  values = {f"{part}.{name}": x for part, group in SETTINGS.items() for name, x in group.items()}
  values |= {name.replace("__", ".") if "__" in name else f"training.{name}": x
            for name, x in changes.items()}  # fmt: skip
  settings = [f"--config.{name}={value}" for name, value in values.items()]
  return ["--config=configs/autoencoder.py", f"--workdir={directory}", *settings]


def command(processes: int, *words: str, grace: int = 60) -> list[str]:
  """Returns the command of several processes that share DEVICES devices."""
  launcher = [
    sys.executable, "launch/local_processes.py", f"--processes={processes}",
    f"--devices={DEVICES // processes}", f"--grace_seconds={grace}", "--",
  ]  # fmt: skip
  return [*launcher, sys.executable, "-m", "calm_jax.main", *words]


def run_job(processes: int, *words: str, expected: int = 0) -> str:
  """Runs a job to its end and returns its standard error."""
  process = start(*command(processes, *words))
  _, output = process.communicate(timeout=200)
  assert process.returncode == expected, output
  return output


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
def one_process_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The workdir of an uninterrupted run of one process."""
  directory = tmp_path_factory.mktemp("whole") / "run"
  run_job(1, *flags(directory))
  return directory


@pytest.fixture(scope="module")
def four_process_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
  """The workdir of an uninterrupted run of four processes, and their standard error."""
  directory = tmp_path_factory.mktemp("four") / "run"
  return directory, run_job(4, *flags(directory))


def assert_same(a: pathlib.Path, b: pathlib.Path) -> None:
  """Asserts equal reports and parameters, up to rounding.

  The order of sums depends on the processes, and Adam turns rounding errors of a tiny gradient into
  steps. A parameter can move by 18e-3 in total.
  """
  assert [record["step"] for record in records(a)] == list(range(1, STEPS + 1))
  np.testing.assert_allclose(losses(a), losses(b), rtol=1e-6)
  for x, y in zip(params(a), params(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_four_processes_compute_the_same_as_one(four_process_run, one_process_run):
  directory, output = four_process_run
  assert_same(directory, one_process_run)
  for name in ("token_accuracy", "cross_entropy"):
    np.testing.assert_allclose(
      [record[name] for record in records(directory, "evaluation")],
      [record[name] for record in records(one_process_run, "evaluation")],
      rtol=1e-5,
    )
  descriptions = re.findall(
    r"process (\d) of 4: 1 of 4 devices \(cpu\), slice 0, jax \S+, config (\w+)", output
  )
  assert sorted(index for index, _ in descriptions) == ["0", "1", "2", "3"]
  assert len({config for _, config in descriptions}) == 1
  assert output.count("train 3/6") == 1  # Only process 0 prints figures.


def test_a_run_resumes_with_another_number_of_processes(one_process_run, tmp_path: pathlib.Path):
  """Two processes start, one continues on another mesh, two finish."""
  directory = tmp_path / "run"
  run_job(2, *flags(directory, steps=2), "--allow_config_change")
  run_job(1, *flags(directory, steps=4, mesh__data=2, mesh__fsdp=2), "--allow_config_change")
  run_job(2, *flags(directory), "--allow_config_change")
  assert_same(directory, one_process_run)


def test_a_workdir_in_use_is_refused_by_all_processes(tmp_path: pathlib.Path):
  directory = tmp_path / "run"
  with lease.Lease(lease.of_folder(directory), f"--workdir={directory}"):
    output = run_job(2, *flags(directory), expected=errors.EXIT_BAD_INPUT)
  refusals = [line for line in output.splitlines() if "is being written by process" in line]
  assert len(refusals) == 2 and "Traceback" not in output
  assert not directory.exists()


def start_job(processes: int, directory: pathlib.Path, *words: str, **changes):
  return start(*command(processes, *flags(directory, **changes), *words))


def wait_for_step(directory: pathlib.Path, step: int) -> None:
  deadline = time.monotonic() + 100
  while not (directory / workdir.METRICS).exists() or len(losses(directory)) < step:
    assert time.monotonic() < deadline
    time.sleep(0.02)


def test_sigterm_saves_the_same_step_on_all_and_requests_a_restart(tmp_path: pathlib.Path):
  directory = tmp_path / "run"
  process = start_job(2, directory, steps=100_000, eval_every=0, checkpoint_every=100_000)
  wait_for_step(directory, 3)
  process.send_signal(signal.SIGTERM)
  _, output = process.communicate(timeout=60)
  assert process.returncode == errors.EXIT_RESTART, output
  (step,) = [int(path.name) for path in (directory / "checkpoints").iterdir()]
  assert f"SIGTERM: saved step {step}; the same command resumes from it" in output
  assert [record["step"] for record in records(directory)] == list(range(1, step + 1))


def pids(process) -> list[int]:
  """Returns the ids of the launched processes, ordered by their number."""
  children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
  number = {}
  for child in map(int, children):
    words = pathlib.Path(f"/proc/{child}/cmdline").read_text().split("\0")
    (flag,) = [word for word in words if word.startswith("--process_id=")]
    number[int(flag.split("=")[1])] = child
  return [number[index] for index in sorted(number)]


def test_a_killed_process_stops_the_others_and_the_job_resumes(tmp_path: pathlib.Path):
  directory = tmp_path / "run"
  process = start_job(
    4, directory, "--heartbeat_timeout=6", steps=100_000, eval_every=0, checkpoint_every=2
  )
  wait_for_step(directory, 5)
  os.kill(pids(process)[2], signal.SIGKILL)
  killed = time.monotonic()
  _, output = process.communicate(timeout=90)
  assert process.returncode == errors.EXIT_RESTART, output
  assert time.monotonic() - killed < 40
  assert re.search(r"process \d of 4: process 2 has shown no sign of life for \d+ s", output)
  newest = max(int(path.name) for path in (directory / "checkpoints").iterdir())
  changed = dict(steps=newest + 3, eval_every=0, checkpoint_every=2)
  assert f"resuming after step {newest}" in run_job(
    2, *flags(directory, **changed), "--allow_config_change"
  )
  run_job(1, *flags(tmp_path / "alone", **changed))
  assert len(losses(directory)) == newest + 3
  np.testing.assert_allclose(losses(directory), losses(tmp_path / "alone"), rtol=1e-5)


# In process 1, reads after the fourth hang, so that it takes part only in void steps.
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


def test_a_process_without_data_stops_all_at_their_last_common_step(tmp_path: pathlib.Path):
  directory = tmp_path / "run"
  words = [sys.executable, "-c", HANGING, *flags(directory, eval_every=0, checkpoint_every=100)]
  process = start(*command(2)[:-3], *words)
  wait_for_step(directory, 3)
  time.sleep(1)
  process.send_signal(signal.SIGTERM)
  _, output = process.communicate(timeout=60)
  assert process.returncode == errors.EXIT_RESTART, output
  assert "SIGTERM: saved step 4;" in output
  changed = dict(eval_every=0, checkpoint_every=100)
  run_job(2, *flags(directory, **changed))
  run_job(1, *flags(tmp_path / "alone", **changed))
  assert [record["step"] for record in records(directory)] == list(range(1, STEPS + 1))
  np.testing.assert_allclose(losses(directory), losses(tmp_path / "alone"), rtol=1e-5)


# A process that joins, calls the job's service all the time, and ends.
BEATING = """
import sys, time
from calm_jax import distributed
distributed.HEARTBEAT_SECONDS = 1e-5
own = dict(word.removeprefix("--").split("=") for word in sys.argv[1:])
number, processes = int(own["process_id"]), int(own["num_processes"])
distributed.initialize(
  distributed.Processes(own["coordinator_address"], num_processes=processes, process_id=number)
)
time.sleep(0.2)
"""


def test_the_heartbeats_end_before_python_does():
  process = start(*command(4)[:-3], sys.executable, "-c", BEATING)
  _, output = process.communicate(timeout=100)
  assert process.returncode == 0, output


def assert_each_reports(output: str, processes: int, message: str) -> None:
  for index in range(processes):
    lines = [line for line in output.splitlines() if line.startswith(f"[{index}] error:")]
    assert len(lines) == 1 and message in lines[0], output


def test_bad_input_is_reported_by_each_process(tmp_path: pathlib.Path):
  output = run_job(2, *flags(tmp_path / "run", mesh__fsdp=3), expected=errors.EXIT_BAD_INPUT)
  assert_each_reports(
    output, 2, "needs a multiple of 3 devices and there are 4: change --config.mesh.fsdp"
  )
  output = run_job(2, *flags(tmp_path / "run", batch=6), expected=errors.EXIT_BAD_INPUT)
  assert_each_reports(
    output, 2, "must be a multiple of accumulation * data * fsdp = 4 on this mesh, got 6"
  )
  assert not (tmp_path / "run").exists()


def run_processes(tmp_path: pathlib.Path, *words: list[str]) -> list[tuple[int, str]]:
  """Returns exit code and standard error of each process; each has its own words."""
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


def test_processes_with_different_configs_are_refused_within_a_minute(tmp_path: pathlib.Path):
  began = time.monotonic()
  results = run_processes(tmp_path, flags(tmp_path / "run"), flags(tmp_path / "run", seed=1))
  assert time.monotonic() - began < 60
  for code, output in results:
    assert code == errors.EXIT_BAD_INPUT
    assert re.search(r"error: process 0 has config \w{8}, process 1 has \w{8}: start all", output)


def test_an_error_of_one_process_is_reported_by_the_others(tmp_path: pathlib.Path):
  words = flags(tmp_path / "run")
  broken = [w.replace("synthetic:300", str(tmp_path / "nothing")) for w in words]
  for index, (code, output) in enumerate(run_processes(tmp_path, words, broken)):
    assert code == errors.EXIT_BAD_INPUT
    assert ("error: process 1: no such token" if index == 0 else "error: no such token") in output


def test_a_missing_process_is_reported_by_the_others(tmp_path: pathlib.Path):
  address = f"--coordinator_address=127.0.0.1:{launcher.free_port()}"
  words = [*flags(tmp_path / "run"), address, "--num_processes=2", "--initialization_timeout=5"]
  process = start(sys.executable, "-m", "calm_jax.main", *words, "--process_id=0")
  _, output = process.communicate(timeout=60)
  assert process.returncode == errors.EXIT_RESTART, output
  assert "not all 2 processes joined within --initialization_timeout=5 s" in output
