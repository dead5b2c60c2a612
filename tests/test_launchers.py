"""Claims about the launchers: their output, their calls and their exit codes, without a cluster."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import jsonschema
import pytest
import yaml
from processes import ON_SIGNAL, ROOT, finish, refused, start, wait_for

PYTHON = sys.executable
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
WITH_FLAGS = [path for path in SCRIPTS if "\nparse " in path.read_text()]
RESTART, DETACHED, POD = "launch/restart.sh", "launch/detached.sh", "launch/tpu_pod.sh"
GKE, SLURM, GPU_NODE = "launch/gke.sh", "launch/slurm.sh", "launch/gpu_node.sh"
BENCHMARK = "launch/benchmark.sh"
TRAIN = ("python", "-m", "calm_jax.main", "--config=configs/calm.py:xl", "--workdir=gs://b/w")
PLACE = ("--name=n", "--zone=z")
CLUSTER = (
  "--topology=v5p:4x4x8",
  "--slices=2",
  "--image=r/i:1",
  "--config=configs/calm.py:xl",
  "--workdir=gs://b/w",
)


@pytest.fixture
def fakes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
  """A folder first on PATH in which every tool of a cluster records its calls and fails."""
  folder = tmp_path / "fakes"
  folder.mkdir()
  for name in ("gcloud", "kubectl", "xpk", "sbatch", "srun", "scontrol", "nvidia-smi"):
    fake(folder, name, "exit 99")
  monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
  return folder


def fake(folder: pathlib.Path, name: str, lines: str) -> None:
  """Makes the tool `name` record its words and then run bash lines in the folder of the fakes."""
  note = 'printf "%s\\n" "${0##*/} $*" >>called'
  path = folder / name
  path.write_text(f'#!/usr/bin/env bash\ncd "$(dirname "$0")" || exit\n{note}\n{lines}\n')
  path.chmod(0o755)


def called(folder: pathlib.Path) -> list[str]:
  """Returns the recorded calls of the fakes, in order."""
  path = folder / "called"
  return path.read_text().splitlines() if path.exists() else []


def printed(*words: object) -> list[list[str]]:
  """Returns the words of each command that a dry run prints, without comments."""
  code, output, errors = finish(start(*words, "--dry_run"))
  assert code == 0, errors
  return [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]


def dry(*words: object) -> list[list[str]]:
  """Like `printed`, for a launcher with a command after --."""
  place = words.index("--")
  code, output, errors = finish(start(*words[:place], "--dry_run", *words[place:]))
  assert code == 0, errors
  return [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]


# Every script.


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci/run"], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: pathlib.Path):
  tool = shutil.which("shellcheck", path=f"{pathlib.Path(PYTHON).parent}:{os.environ['PATH']}")
  assert tool
  done = subprocess.run([tool, "-x", path], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", WITH_FLAGS, ids=lambda path: path.name)
def test_help_lists_every_flag(path: pathlib.Path, fakes: pathlib.Path):
  code, output, errors = finish(start(path, "--help"))
  assert code == 0 and not errors and not called(fakes)
  match = re.search(r'^parse "(.*?)" "(.*?)"', path.read_text(), re.MULTILINE | re.DOTALL)
  assert match
  names = f"{match[1]} {match[2]} dry_run".replace("\\\n", "").split()
  assert [name for name in names if f"--{name}" not in output] == []


@pytest.mark.parametrize(
  ("words", "reason"),
  [
    ((RESTART,), "command"),
    ((RESTART, "--attempts=x", "--", "true"), "--attempts"),
    ((RESTART, "--codes=75;134", "--", "true"), "--codes"),
    ((RESTART, "--attemps=1", "--", "true"), "--attemps"),
    ((RESTART, "--attempts", "--", "true"), "--attempts=..."),
    ((RESTART, "--", "no-such-command"), "no-such-command"),
    ((DETACHED,), "command"),
    ((DETACHED, "--follow", "--folder=/nowhere"), "/nowhere"),
    ((DETACHED, "--stop", "--folder=/nowhere"), "nothing runs"),
    ((POD,), "create"),
    ((POD, "crate", *PLACE), "create"),
    ((POD, "create", *PLACE), "--type"),
    ((POD, "create", "--name=n", "--type=v5p-8"), "--zone"),
    ((POD, "create", *PLACE, "--type=v9-8"), "--runtime"),
    ((POD, "create", *PLACE, "--type=v5p-8", "--slices=0"), "--slices"),
    ((POD, "run", *PLACE), "command"),
    ((POD, "delete", *PLACE, "now"), "now"),
    ((GKE,), "--topology"),
    ((GKE, "aply", *CLUSTER), "apply"),
    ((GKE, *CLUSTER, "xpk"), "xpk"),
    ((GKE, *CLUSTER, "--topology=v5p-128"), "v5p-128"),
    ((GKE, *CLUSTER, "--topology=v7:2x2"), "v7"),
    ((GKE, *CLUSTER, "--chips_per_host=3"), "--chips_per_host"),
    ((GKE, *CLUSTER, "--workdir=/tmp/w"), "gs://"),
    ((GKE, *CLUSTER, "--name=Calm_JAX"), "Calm_JAX"),
    ((GKE, "xpk", *CLUSTER), "--cluster"),
    ((SLURM, "--gpus_per_node=8", "--", "true"), "--nodes"),
    ((SLURM, "--nodes=2", "--gpus_per_node=8"), "command"),
    ((SLURM, "--nodes=2", "--gpus_per_node=8", "--per=host", "--", "true"), "host"),
    ((BENCHMARK,), "--output"),
    ((BENCHMARK, "--output=o", "--sizes=s"), "--sizes"),
    ((GPU_NODE,), "command"),
    ((GPU_NODE, "--", "true"), "nvidia-smi"),
  ],
)
def test_bad_flags_are_refused_in_one_line(
  fakes: pathlib.Path, words: tuple[str, ...], reason: str
):
  refused(words, reason)
  assert [line for line in called(fakes) if not line.startswith("nvidia-smi")] == []


# Restarts.


@pytest.fixture
def script(tmp_path: pathlib.Path):
  """Returns a function that makes an executable of bash lines, which runs in its own folder."""

  def make(lines: str) -> pathlib.Path:
    path = tmp_path / "command"
    path.write_text(f'#!/usr/bin/env bash\ncd "$(dirname "$0")" || exit\necho >>runs\n{lines}\n')
    path.chmod(0o755)
    return path

  return make


def runs(path: pathlib.Path) -> int:
  """Returns how often a command made by `script` has run."""
  return (path.parent / "runs").read_text().count("\n")


def test_a_command_that_exits_with_75_is_restarted(script):
  command = script('[ "$(wc -l <runs)" = 3 ] || exit 75')
  status, _, errors = finish(start(RESTART, "--wait=0", "--", command))
  assert status == 0 and runs(command) == 3
  assert errors.count("exit code 75: restart") == 2


@pytest.mark.parametrize("code", [0, 1, 2, 127, 130])
def test_any_other_code_is_final(script, code: int):
  command = script(f"exit {code}")
  assert finish(start(RESTART, "--wait=0", "--", command))[0] == code
  assert runs(command) == 1


def test_other_codes_may_request_a_restart(script):
  command = script('[ "$(wc -l <runs)" = 2 ] || exit 134')
  assert finish(start(RESTART, "--wait=0", "--codes=75,134", "--", command))[0] == 0
  assert runs(command) == 2


def test_restarts_without_progress_are_counted(script):
  command = script("exit 75")
  status, _, errors = finish(start(RESTART, "--wait=0", "--attempts=2", "--", command))
  assert status == 1 and runs(command) == 3
  assert errors.splitlines()[-1].startswith("error: ") and "no progress" in errors


def test_a_new_checkpoint_counts_as_progress(script, tmp_path: pathlib.Path):
  (tmp_path / "W/checkpoints").mkdir(parents=True)
  command = script(
    'n=$(wc -l <runs); [ "$n" -lt 6 ] || exit 0; [ "$n" -gt 4 ] || touch W/checkpoints/$n; exit 75'
  )
  words = ("--wait=0", "--attempts=2", "--", command, f"--workdir={tmp_path}/W")
  assert finish(start(RESTART, *words))[0] == 0
  assert runs(command) == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_ends_the_restarts(
  script, tmp_path: pathlib.Path, number: signal.Signals
):
  code = ON_SIGNAL.replace("NAME", number.name)
  (tmp_path / "notes").mkdir()
  command = script(f"exec {PYTHON} -c {shlex.quote(code)} notes --process_id=0")
  launcher = start(RESTART, "--wait=0", "--", command)
  wait_for(tmp_path / "notes/0")
  launcher.send_signal(number)
  code, _, errors = finish(launcher)
  assert code == 75 and "restart" not in errors
  assert runs(command) == 1 and (tmp_path / "notes/0").read_text() == "seen 1"


def test_ctrl_c_is_not_ignored_in_a_restarted_command(script, tmp_path: pathlib.Path):
  code = "import pathlib, time; pathlib.Path('begun').touch(); time.sleep(60)"
  command = script(f"exec {PYTHON} -c {shlex.quote(code)}")
  launcher = start(RESTART, "--", command)
  wait_for(tmp_path / "begun")
  launcher.send_signal(signal.SIGINT)
  code, _, errors = finish(launcher)
  assert code == 130 and "KeyboardInterrupt" in errors


def test_a_signal_between_two_runs_ends_the_restarts(script, tmp_path: pathlib.Path):
  command = script("exit 75")
  launcher = start(RESTART, "--wait=60", "--", command)
  wait_for(tmp_path / "runs")
  assert launcher.stderr and "restart 1" in launcher.stderr.readline()
  launcher.send_signal(signal.SIGTERM)
  assert finish(launcher)[0] == 75 and runs(command) == 1


def test_a_dry_run_of_restart_prints_the_command(script):
  command = script("exit 75")
  assert dry(RESTART, "--", command, "a b") == [[str(command), "a b"]]
  assert not (command.parent / "runs").exists()


# Runs that continue without their terminal.


def test_a_detached_run_continues_and_is_followed_to_its_exit_code(script, tmp_path: pathlib.Path):
  command = script("echo begun; until [ -e go ]; do sleep 0.05; done; echo done; exit 3")
  folder = f"--folder={tmp_path}/run"
  terminal = start("setsid", DETACHED, folder, "--", command)
  code, _, errors = finish(terminal)
  assert code == 0 and "started" in errors
  wait_for(tmp_path / "runs")
  with contextlib.suppress(ProcessLookupError):
    os.killpg(terminal.pid, signal.SIGKILL)
  assert "running" in finish(start(DETACHED, folder, "--status"))[1]
  assert "running already" in finish(start(DETACHED, folder, "--", command))[2]
  follower = start(DETACHED, folder, "--follow")
  (tmp_path / "go").touch()
  code, output, _ = finish(follower)
  assert code == 3 and output == "begun\ndone\n" and runs(command) == 1
  assert finish(start(DETACHED, folder, "--status"))[1].endswith("ended with 3: done\n")
  assert finish(start(DETACHED, folder, "--follow"))[:2] == (3, "begun\ndone\n")


def test_a_detached_run_is_stopped_by_sigterm(script, tmp_path: pathlib.Path):
  (tmp_path / "notes").mkdir()
  code = shlex.quote(ON_SIGNAL.replace("NAME", "SIGTERM"))
  command = script(f"exec {PYTHON} -c {code} notes --process_id=0")
  folder = f"--folder={tmp_path}/run"
  finish(start(DETACHED, folder, "--", RESTART, "--", command))
  wait_for(tmp_path / "notes/0")
  assert finish(start(DETACHED, folder, "--stop"))[0] == 0
  assert finish(start(DETACHED, folder, "--follow"))[0] == 75
  assert (tmp_path / "notes/0").read_text() == "seen 1"


def test_a_process_that_got_a_detached_runs_id_is_left_alone(script, tmp_path: pathlib.Path):
  """The machine was rebooted, and the id belongs to another process now."""
  folder = tmp_path / "run"
  finish(start(DETACHED, f"--folder={folder}", "--", script("exit 0")))
  wait_for(folder / "exit_code")
  (folder / "exit_code").unlink()
  other = start("sleep", "100")
  _, *started = (folder / "pid").read_text().split()
  (folder / "pid").write_text(" ".join([str(other.pid), *started]) + "\n")
  try:
    refused((DETACHED, f"--folder={folder}", "--stop"), "nothing runs")
    assert "nothing runs" in finish(start(DETACHED, f"--folder={folder}", "--status"))[1]
    assert finish(start(DETACHED, f"--folder={folder}", "--follow"))[0] == 75
    assert other.poll() is None
  finally:
    other.kill()
    other.communicate()


# TPU VMs.


def test_a_slice_is_requested_as_one_node(fakes: pathlib.Path):
  [words] = printed(POD, "create", *PLACE, "--type=v5p-128", "--spot")
  assert " ".join(words) == (
    "gcloud compute tpus queued-resources create n --zone=z --accelerator-type=v5p-128 "
    "--runtime-version=v2-alpha-tpuv5 --node-id=n --spot"
  )
  assert not called(fakes)


def test_several_slices_are_requested_together(fakes: pathlib.Path):
  flags = ("--type=v6e-256", "--slices=4", "--project=p", "--create_flags=--reserved --tags=a")
  [words] = printed(POD, "create", *PLACE, *flags)
  assert {"--node-count=4", "--node-prefix=n", "--project=p", "--reserved", "--tags=a"} < {*words}
  assert "--runtime-version=v2-alpha-tpuv6e" in words and not {"--node-id=n", "--spot"} & {*words}
  assert not called(fakes)


@pytest.mark.parametrize(
  ("slices", "service", "all_", "first"),
  [
    (1, "tpu-vm", {"--worker=all"}, {"--worker=0"}),
    (2, "queued-resources", {"--worker=all", "--node=all"}, {"--worker=0", "--node=0"}),
  ],
)
def test_a_run_starts_everywhere_and_follows_the_first_worker(
  fakes: pathlib.Path, slices: int, service: str, all_: set[str], first: set[str]
):
  started, followed = dry(POD, "run", *PLACE, f"--slices={slices}", "--", *TRAIN, "--x=a b")
  for words, where in ((started, all_), (followed, first)):
    assert words[3:5] == [service, "ssh"] and "n" in words and where | {"--zone=z"} < {*words}
  inner = shlex.split(started[-1].removeprefix("--command="))
  assert inner[:2] == ["cd", "~/calm_jax"]
  place = inner.index("launch/detached.sh")
  restart = ["launch/restart.sh", "--attempts=10", "--codes=75,134"]
  assert inner[place:] == ["launch/detached.sh", "--", *restart, "--", *TRAIN, "--x=a b"]
  assert followed[-1].endswith("launch/detached.sh --follow") and not called(fakes)


def test_the_commit_that_is_checked_out_is_installed(fakes: pathlib.Path):
  commit = subprocess.check_output(
    ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, text=True
  ).strip()
  archive, copy, remote = printed(POD, "install", *PLACE)
  assert archive[:2] == ["git", "archive"] and archive[-1] == commit
  assert copy[3:5] == ["tpu-vm", "scp"] and "--worker=all" in copy
  assert archive[3].removeprefix("--output=") in copy and "n:" in copy
  assert f"tar -xzf ~/calm_jax-{commit}.tar.gz" in remote[-1]
  assert "source launch/environment.sh tpu" in remote[-1]
  [remote] = printed(POD, "install", *PLACE, "--slices=2", "--clone=https://host/calm_jax")
  assert "git clone --quiet https://host/calm_jax" in remote[-1]
  assert f"checkout --quiet {commit}" in remote[-1] and "--node=all" in remote
  assert not called(fakes)


@pytest.mark.parametrize(
  ("act", "command"),
  [
    ("follow", "--follow"),
    ("stop", "--stop"),
    ("status", "--status"),
    ("delete", "queued-resources delete n --zone=z --force --quiet"),
  ],
)
def test_other_acts_on_a_pod_print_their_command(fakes: pathlib.Path, act: str, command: str):
  assert " ".join(printed(POD, act, *PLACE)[-1]).endswith(command)
  assert not called(fakes)


def test_a_dry_run_of_watch_prints_every_command(fakes: pathlib.Path):
  words = dry(POD, "watch", *PLACE, "--type=v5p-128", "--", *TRAIN)
  acts = [line[4] if line[0] == "gcloud" else line[1] for line in words]
  assert acts == ["describe", "delete", "create", "archive", "scp", "ssh", "ssh", "ssh"]
  assert not called(fakes)


# A TPU whose states are the lines of one file, and whose followed runs end with the exit codes in
# another file.
GCLOUD = r"""
next() { head -n 1 "$1"; sed -i 1d "$1"; }
case "$*" in
  *describe*)
    state=$(next states)
    [ "$state" != ABSENT ] || { echo "ERROR: NOT_FOUND: no n" >&2; exit 1; }
    echo "$state" ;;
  *--follow*) exit "$(next codes)" ;;
esac
"""


def watched(fakes: pathlib.Path, states: str, codes: str) -> tuple[int, list[str]]:
  """Returns the exit code of watch over a TPU of these states, and the acts that it called."""
  (fakes / "states").write_text("\n".join([*states.split(), *["FAILED"] * 9]) + "\n")
  (fakes / "codes").write_text("\n".join(codes.split()) + "\n")
  fake(fakes, "gcloud", GCLOUD)
  fake(fakes, "sleep", "")
  code, _, _ = finish(start(POD, "watch", *PLACE, "--type=v5p-8", "--spot", "--", *TRAIN))
  names = {"--follow": "follow", "detached.sh --": "run", "environment.sh": "install"}
  acts = []
  for line in called(fakes):
    matches = [name for part, name in names.items() if part in line]
    acts += matches[:1] or re.findall(r"queued-resources (create|delete) n", line)
  return code, acts


def test_watch_creates_the_tpu_again_after_a_preemption(fakes: pathlib.Path):
  states = "ABSENT WAITING_FOR_RESOURCES ACTIVE SUSPENDING SUSPENDED PROVISIONING ACTIVE"
  assert watched(fakes, states, "255 0") == (
    0,
    ["create", "install", "run", "follow", "delete", "create", "install", "run", "follow"],
  )


def test_watch_restarts_a_run_that_requests_it_on_the_same_tpu(fakes: pathlib.Path):
  assert watched(fakes, "ACTIVE ACTIVE ACTIVE", "75 255 0") == (
    0,
    ["install", *["run", "follow"] * 3],
  )


@pytest.mark.parametrize("code", [2, 1])
def test_watch_ends_with_an_exit_code_that_no_restart_helps(fakes: pathlib.Path, code: int):
  assert watched(fakes, "ACTIVE ACTIVE", str(code)) == (code, ["install", "run", "follow"])


def test_watch_treats_a_crash_before_a_suspension_as_a_preemption(fakes: pathlib.Path):
  assert watched(fakes, "ACTIVE SUSPENDING SUSPENDED ACTIVE", "134 0") == (
    0,
    ["install", "run", "follow", "delete", "create", "install", "run", "follow"],
  )


# GKE.


def manifest(*words: str) -> dict:
  """Returns the JobSet that a dry run prints."""
  code, output, errors = finish(start(GKE, *CLUSTER, "--dry_run", *words))
  assert code == 0, errors
  assert output.startswith("# kubectl apply -f -\n") and "${" not in output
  return yaml.safe_load(output)


SCHEMA = json.loads((ROOT / "tests/jobset_schema.json").read_text())


@pytest.mark.parametrize("words", [(), ("--spot", "--service_account=trainer")])
def test_the_jobset_fits_the_controllers_schema(fakes: pathlib.Path, words: tuple[str, ...]):
  jsonschema.Draft202012Validator.check_schema(SCHEMA)
  jsonschema.validate(manifest(*words), SCHEMA)
  assert not called(fakes)


@pytest.mark.parametrize("wrong", ["maxRestart", "terminationGracePeriod", "google.com/tpus"])
def test_a_misspelled_field_does_not_pass_the_schema(wrong: str):
  text = json.dumps(manifest())
  right = {"maxRestart": "maxRestarts", "google.com/tpus": "google.com/tpu"}
  right = right.get(wrong, "terminationGracePeriodSeconds")
  assert f'"{right}"' in text
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate(json.loads(text.replace(f'"{right}"', f'"{wrong}"')), SCHEMA)


def test_the_jobset_has_a_job_per_slice_and_a_pod_per_host():
  data = manifest("--spot", "--", "--config.data.path=gs://b/d", '--x=a "b" \\')
  [slices] = data["spec"]["replicatedJobs"]
  job = slices["template"]["spec"]
  pod = job["template"]["spec"]
  [container] = pod["containers"]
  assert slices["replicas"] == 2
  assert job["parallelism"] == job["completions"] == 4 * 4 * 8 / 4
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert container["command"] == [*TRAIN, "--config.data.path=gs://b/d", '--x=a "b" \\']
  assert container["image"] == "r/i:1"
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
    "cloud.google.com/gke-tpu-topology": "4x4x8",
    "cloud.google.com/gke-spot": "true",
  }
  assert "cloud.google.com/gke-spot" not in str(manifest())


@pytest.mark.parametrize(
  ("topology", "hosts", "chips"),
  [("v6e:1x1", 1, 1), ("v6e:2x2", 1, 4), ("v5e:4x8", 8, 4), ("v4:2x2x4", 4, 4)],
)
def test_hosts_follow_from_the_topology(topology: str, hosts: int, chips: int):
  [slices] = manifest(f"--topology={topology}")["spec"]["replicatedJobs"]
  job = slices["template"]["spec"]
  limits = job["template"]["spec"]["containers"][0]["resources"]["limits"]
  assert (job["completions"], limits["google.com/tpu"]) == (hosts, chips)


def test_75_and_preemption_restart_the_set_and_other_codes_end_it():
  spec = manifest()["spec"]
  job = spec["replicatedJobs"][0]["template"]["spec"]
  disrupted, final = job["podFailurePolicy"]["rules"]
  assert disrupted["action"] == "Count" and job["backoffLimit"] == 0
  assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
  assert final["action"] == "FailJob" and final["onExitCodes"]["operator"] == "NotIn"
  assert final["onExitCodes"]["values"] == [75, 134]
  [rule] = spec["failurePolicy"]["rules"]
  assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
  assert spec["failurePolicy"]["maxRestarts"] == 50


def test_the_manifest_is_applied(fakes: pathlib.Path):
  fake(fakes, "kubectl", "cat >applied")
  assert finish(start(GKE, *CLUSTER))[0] == 0
  assert called(fakes) == ["kubectl apply -f -"]
  assert yaml.safe_load((fakes / "applied").read_text()) == manifest()


@pytest.mark.parametrize(
  ("topology", "kind"),
  [("v5p:4x4x8", "v5p-256"), ("v5e:4x8", "v5litepod-32"), ("v6e:4x4", "v6e-16")],
)
def test_xpk_gets_the_same_run(fakes: pathlib.Path, topology: str, kind: str):
  code, output, _ = finish(start(GKE, "xpk", *CLUSTER, f"--topology={topology}", "--cluster=c"))
  words = shlex.split(output)
  assert code == 0 and words[:3] == ["xpk", "workload", "create"]
  expected = {
    "--cluster=c",
    f"--tpu-type={kind}",
    "--num-slices=2",
    "--docker-image=r/i:1",
    "--max-restarts=50",
    "--restart-on-exit-codes=75",
    f"--command={shlex.join(TRAIN)}",
  }
  assert expected < {*words}
  assert not called(fakes)


def test_status_and_delete_name_the_set(fakes: pathlib.Path):
  assert printed(GKE, "status")[0][:4] == ["kubectl", "get", "jobset", "calm-jax"]
  assert printed(GKE, "delete", "--name=a", "--namespace=b") == [
    ["kubectl", "delete", "jobset", "a", "--namespace=b"]
  ]
  assert not called(fakes)


# Slurm.

NODES = ("--nodes=2", "--gpus_per_node=8")


@pytest.mark.parametrize(("per", "tasks"), [("gpu", 8), ("node", 1)])
def test_a_slurm_job_has_a_task_per_gpu_or_per_node(fakes: pathlib.Path, per: str, tasks: int):
  flags = (f"--per={per}", "--time=1:00", "--cpus_per_task=4", "--sbatch_flags=--partition=p -A a")
  batch, step = dry(SLURM, *NODES, *flags, "--", *TRAIN)
  expected = {"--nodes=2", f"--ntasks-per-node={tasks}", "--gpus-per-node=8", "--time=1:00"}
  expected |= {"--cpus-per-task=4", "--partition=p", "-A", "a"}
  assert batch[0] == "sbatch" and expected < {*batch}
  assert batch[batch.index(SLURM) :] == [SLURM, "job", per, "8", "4", "50", *TRAIN]
  flags = "--kill-on-bad-exit=0 --wait=120 --gpu-bind=none --cpus-per-task=4"
  assert shlex.join(step) == f"srun {flags} {shlex.join(TRAIN)}"
  assert not called(fakes)
  directives = re.findall(r"^#SBATCH (.*)", (ROOT / SLURM).read_text(), re.MULTILINE)
  assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} < {*directives}


@pytest.mark.parametrize(
  ("code", "count", "ended", "requeued"),
  [(0, 0, 0, False), (75, 49, 0, True), (75, 50, 1, False), (2, 0, 2, False), (1, 0, 1, False)],
)
def test_a_slurm_job_is_queued_again_only_on_75(
  fakes: pathlib.Path, code: int, count: int, ended: int, requeued: bool
):
  fake(fakes, "srun", f"exit {code}")
  fake(fakes, "scontrol", "")
  places = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(count)}
  job = start("bash", SLURM, "job", "gpu", "8", "0", "50", *TRAIN, **places)
  assert finish(job)[0] == ended
  step, *after = called(fakes)
  assert step.endswith(" ".join(TRAIN)) and after == ["scontrol requeue 7"] * requeued


@pytest.mark.parametrize(("per", "devices"), [("gpu", "unset"), ("node", "0,1,2,3")])
def test_one_process_per_node_gets_all_its_gpus(fakes: pathlib.Path, per: str, devices: str):
  fake(fakes, "srun", 'echo "${JAX_LOCAL_DEVICE_IDS:-unset}"')
  assert finish(start("bash", SLURM, "job", per, "4", "0", "50", "true"))[1] == f"{devices}\n"


# A machine with GPUs.


@pytest.mark.parametrize(
  ("driver", "flags", "extra"),
  [("580.65.06", (), "cuda"), ("570.10", (), "cuda12"), ("590.1", ("--cuda=12",), "cuda12")],
)
def test_the_driver_decides_which_cuda_is_installed(
  fakes: pathlib.Path, driver: str, flags: tuple[str, ...], extra: str
):
  fake(fakes, "nvidia-smi", f"echo '{driver}, NVIDIA H100, 81559 MiB'")
  install, run = dry(GPU_NODE, *flags, "--", *TRAIN)
  assert install == ["source", "launch/environment.sh", extra]
  assert run == ["launch/restart.sh", "--attempts=10", "--", *TRAIN]
  assert {line.split()[0] for line in called(fakes)} == {"nvidia-smi"}


@pytest.mark.parametrize("answer", ["470.82, Tesla K80, 1 MiB", "No devices were found"])
def test_a_machine_that_can_not_run_cuda_12_is_refused(fakes: pathlib.Path, answer: str):
  fake(fakes, "nvidia-smi", f"echo '{answer}'")
  code, output, errors = finish(start(GPU_NODE, "--", "true"))
  assert code == 2 and not output
  assert errors.splitlines()[-1].startswith("error: ")


# Measuring.


def test_the_benchmark_script_measures_each_size_and_keeps_partial_results(
  fakes: pathlib.Path, tmp_path: pathlib.Path
):
  words = printed(BENCHMARK, f"--output={tmp_path}/new", "--sizes=l,xl")
  configs = [word for line in words for word in line if "--config=" in word]
  assert configs == ["--config=configs/calm.py:l", "--config=configs/calm.py:xl"]
  assert not (tmp_path / "new").exists()
  fake(fakes, "python", 'case "$*" in *:xl*) exit 3 ;; *) echo measured ;; esac')
  code, output, errors = finish(start(BENCHMARK, f"--output={tmp_path}/new", "--sizes=l,xl"))
  assert code == 0, errors
  table = (tmp_path / "new/table.txt").read_text()
  assert output == table == "measured\ncalm.py:xl was stopped or failed\n"
