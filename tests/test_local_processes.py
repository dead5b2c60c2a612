"""Claims about launch/local_processes.py, with real processes."""

import importlib.util
import pathlib
import shlex
import signal
import sys
import time

import pytest
from processes import ON_SIGNAL, ROOT, finish, refused, start, wait_for

PYTHON = sys.executable
SPEC = importlib.util.spec_from_file_location("local", ROOT / "launch/local_processes.py")
assert SPEC and SPEC.loader
local_processes = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(local_processes)
LOCAL = (PYTHON, "launch/local_processes.py")
# Exits with the code that belongs to its process id.
CODES = "import sys; sys.exit([{}][int(sys.argv[-1].split('=')[1])])"


def test_every_process_gets_its_id_and_its_devices():
  code = (
    "import os, sys; print(sys.argv[1:], file=sys.stderr); print(os.environ['JAX_PLATFORMS']);"
    "print(os.environ['XLA_FLAGS'])"
  )
  flags = "--xla_force_host_platform_device_count=8 --xla_cpu_enable_fast_math=false"
  status, output, errors = finish(
    start(*LOCAL, "--processes=2", "--devices=3", "--", PYTHON, "-c", code, "a b", XLA_FLAGS=flags)
  )
  assert status == 0
  expected = "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=3"
  assert sorted(output.splitlines()) == sorted(
    f"[{index}] {line}" for index in (0, 1) for line in ("cpu", expected)
  )
  lines = sorted(errors.splitlines())
  ports = {line.split("127.0.0.1:")[1].split("'")[0] for line in lines}
  assert len(ports) == 1 and 1024 < int(*ports) < 65536
  assert lines == [
    f"[{index}] ['a b', '--coordinator_address=127.0.0.1:{port}', '--num_processes=2', "
    f"'--process_id={index}']"
    for index in (0, 1)
    for port in ports
  ]


def test_each_process_has_its_own_gpus():
  expected = {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": "4,5"}
  assert local_processes.settings(2, 2, "cuda") == expected


@pytest.mark.parametrize(
  ("codes", "joint"),
  [
    ([0, 0], 0),
    ([0, 75, 75], 75),
    ([75, 2, 3], 2),
    ([0, 3, 75], 3),
    ([0, -9], 137),
    ([-9, 75], 75),
    ([-9, 75, 1], 1),
    ([130, 130], 130),
  ],
)
def test_one_exit_code_summarizes_all_processes(codes: list[int], joint: int):
  assert local_processes.exit_code(codes) == joint


def test_run_returns_the_exit_code_of_each_process():
  code = "import os, sys; own = sys.argv[-1][-1]; own == '2' and os.kill(os.getpid(), 9);"
  command = [PYTHON, "-c", f"{code} sys.exit([0, 75][int(own)])"]
  assert local_processes.run(command, 3) == [0, 75, -9]
  status, _, _ = finish(start(*LOCAL, "--processes=2", "--", PYTHON, "-c", CODES.format("0, 3")))
  assert status == 3


def test_sigterm_reaches_every_process_once(tmp_path: pathlib.Path):
  launcher = start(
    *LOCAL, "--processes=2", "--", PYTHON, "-c", ON_SIGNAL.replace("NAME", "SIGTERM"), tmp_path
  )
  wait_for(tmp_path / "0")
  wait_for(tmp_path / "1")
  launcher.send_signal(signal.SIGTERM)
  assert finish(launcher)[0] == 75
  assert [(tmp_path / name).read_text() for name in "01"] == ["seen 1", "seen 1"]


def test_after_a_failure_the_others_have_the_grace_period(
  capsys: pytest.CaptureFixture,
):
  code = "import sys, time; own = int(sys.argv[-1][-1]); time.sleep([0, 0.5, 60][own]); {}"
  command = [PYTHON, "-c", code.format("sys.exit([75, 0, 0][own])")]
  began = time.monotonic()
  assert local_processes.run(command, 3, grace_seconds=2) == [75, 0, -signal.SIGKILL]
  assert 2 <= time.monotonic() - began < 20
  assert "process 2 still running 2 s after another failed: killed" in capsys.readouterr().err


def test_a_process_that_is_left_behind_is_killed(tmp_path: pathlib.Path):
  code = (
    "import subprocess, sys, pathlib; child = subprocess.Popen(['sleep', '600']);"
    "pathlib.Path(sys.argv[1]).write_text(str(child.pid))"
  )
  assert local_processes.run([PYTHON, "-c", code, str(tmp_path / "pid")], 1) == [0]
  pid = int((tmp_path / "pid").read_text())
  state = pathlib.Path(f"/proc/{pid}/stat")
  deadline = time.monotonic() + 10
  while state.exists() and state.read_text().split()[2] != "Z":
    assert time.monotonic() < deadline
    time.sleep(0.02)


def test_a_dry_run_of_local_processes_prints_every_command(tmp_path: pathlib.Path):
  status, output, errors = finish(
    start(*LOCAL, "--processes=2", "--dry_run", "--", "touch", tmp_path / "made", XLA_FLAGS="")
  )
  assert status == 0 and not errors and not list(tmp_path.iterdir())
  words = [shlex.split(line) for line in output.splitlines()]
  assert [line[0] for line in words] == ["[0]", "[1]"]
  flags = "XLA_FLAGS=--xla_force_host_platform_device_count=1"
  assert words[1][1:3] == ["JAX_PLATFORMS=cpu", flags]
  assert words[1][-2:] == ["--num_processes=2", "--process_id=1"]


def test_a_sigint_that_was_ignored_at_the_start_stays_ignored():
  """For example in a background job of a script; child processes inherit it."""
  code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
  words = (*LOCAL, "--processes=1", "--", PYTHON, "-c", code)
  ignoring = "trap '' INT; exec " + shlex.join(map(str, words))
  code, output, errors = finish(start("bash", "-c", ignoring))
  assert code == 0 and "True" in output, errors


@pytest.mark.parametrize(
  ("words", "reason"),
  [
    (("--", "true"), "--processes"),
    (("--processes=0", "--", "true"), "--processes"),
    (("--processes=2",), "command"),
    (("--processes=2", "--", "no-such-command"), "no-such-command"),
    (("--proceses=2", "--", "true"), "proceses"),
    (("--processes=2", "--platform=tpu", "--", "true"), "platform"),
  ],
)
def test_local_processes_refuses_bad_flags_in_one_line(words: tuple[str, ...], reason: str):
  refused((*LOCAL, *words), reason)
