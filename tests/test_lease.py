"""Claims about leases: one writer at a time however the last one ended, with clear refusals."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import writers
from processes import finish, start
from test_resume import at_step

from calm_jax import errors, files, holder, lease, prepare, workdir
from calm_jax.running import loading, train

# Takes the lease of a folder under a host name; checks it at each line of standard input.
HOLDER = """
import socket, sys
from calm_jax import errors, lease
socket.gethostname = lambda host=socket.gethostname(): sys.argv[2] or host
lease.HEARTBEAT, lease.EXPIRE = 0.05, 0.5
held = lease.Lease(lease.of_folder(sys.argv[1]), f"--output={sys.argv[1]}")
held.__enter__()
print("held", flush=True)
for line in sys.stdin:
  try:
    held.require_held()
  except errors.CalmError as error:
    print(error, flush=True)
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(lease, "HEARTBEAT", 0.05)
  monkeypatch.setattr(lease, "EXPIRE", 0.5)


def of(folder: pathlib.Path | str) -> lease.Lease:
  return lease.Lease(lease.of_folder(str(folder)), f"--output={folder}")


@contextlib.contextmanager
def holding(folder: pathlib.Path, host: str = "") -> Iterator[subprocess.Popen]:
  """Starts another process that holds the lease of a folder, and kills it at the end."""
  command = [sys.executable, "-c", HOLDER, str(folder), host]
  pipe = subprocess.PIPE
  with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
    try:
      assert process.stdout and process.stdout.readline() == "held\n"
      yield process
    finally:
      process.kill()


def write(folder: pathlib.Path, **changes) -> None:
  """Writes a lease of this process, with `changes`, into a folder."""
  changed = dataclasses.replace(holder.Holder.here(), **changes)
  files.write(folder / ".lease", changed.to_json())


def read(folder: pathlib.Path) -> dict:
  return json.loads((folder / ".lease").read_text())


@pytest.mark.parametrize("name", ["plain", "lr[1e-3]", "back\\slash", "a b/c%20d"])
def test_a_lease_is_renewed_while_held_and_then_removed(tmp_path: pathlib.Path, name: str):
  folder = tmp_path / name
  with of(folder) as folder_lease:
    first = read(folder)
    assert [path.name for path in folder.iterdir()] == [".lease"]
    deadline = time.monotonic() + 30
    while read(folder)["beat"] == first["beat"]:
      assert time.monotonic() < deadline
      time.sleep(0.01)
    folder_lease.require_held()
  assert not list(tmp_path.iterdir())


def test_a_folder_that_existed_or_is_not_empty_is_kept(tmp_path: pathlib.Path):
  with of(tmp_path):
    pass
  with of(tmp_path / "new"):
    (tmp_path / "new/tokens").touch()
  assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokens"]


def test_links_to_a_file_share_its_lease(tmp_path: pathlib.Path):
  (tmp_path / "link").symlink_to("texts")
  assert lease.of_file(f"{tmp_path}/link") == lease.of_file(f"{tmp_path}/texts")
  assert lease.of_file("gs://b/texts") == "gs://b/texts.lease"


def test_a_running_process_keeps_its_lease(tmp_path: pathlib.Path):
  write(tmp_path, since=time.time() - 185)
  with pytest.raises(errors.CalmError) as refused:
    of(tmp_path).attempt()
  whose = f"process {os.getpid()} on {holder.Holder.here().host} (since 3 min)"
  assert str(refused.value) == (
    f"--output={tmp_path} is being written by {whose}: wait for its end or stop it, or give "
    "another --output"
  )


@pytest.mark.parametrize("reaped", [False, True], ids=["a zombie", "nothing left"])
def test_the_lease_of_a_killed_process_can_be_taken_immediately(
  tmp_path: pathlib.Path, reaped: bool
):
  with holding(tmp_path) as process:
    with pytest.raises(errors.CalmError, match=f"by process {process.pid} on "):
      of(tmp_path).attempt()
    process.send_signal(signal.SIGKILL)
    if reaped:
      process.wait()
    else:
      os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    taken = of(tmp_path)
    assert taken.attempt() == 0
    taken.release()


def test_another_process_with_the_same_id_is_not_the_holder(tmp_path: pathlib.Path):
  write(tmp_path, started=1)
  with of(tmp_path):
    assert read(tmp_path)["started"] > 1


def test_a_hidden_process_does_not_count_as_gone(monkeypatch: pytest.MonkeyPatch):
  here = holder.Holder.here()
  monkeypatch.setattr(holder, "_stat", lambda pid: None)
  assert here.runs() is None
  assert dataclasses.replace(here, pid=2**31 - 1).runs() is False


@pytest.mark.parametrize(
  "place", [{"host": "far"}, {"boot": "before"}, {"namespace": "pid:[1]"}], ids=str
)
def test_the_lease_of_another_machine_is_taken_when_its_heartbeat_stops(
  place: dict, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
  write(tmp_path, pid=1, **place)
  began = time.monotonic()
  with of(tmp_path) as folder_lease:
    assert time.monotonic() - began > 0.5
    folder_lease.require_held()
  (line,) = capsys.readouterr().err.splitlines()
  assert re.fullmatch(
    r"--output=.* is held by process 1 on .* \(since 0 s\): waiting up to 0 s for a sign of life",
    line,
  )


def test_the_lease_of_another_machine_is_respected_while_its_heartbeat_changes(
  tmp_path: pathlib.Path,
):
  """Its clock is an hour behind."""
  write(tmp_path, host="far", since=time.time() - 3600)
  waiting = of(tmp_path)
  assert waiting.attempt() > 0
  write(tmp_path, host="far", since=time.time() - 3600, beat=1)
  with pytest.raises(errors.CalmError, match=r"by process \d+ on far \(since 60 min\)"):
    waiting.attempt()


@pytest.mark.parametrize(
  "content", [b"", b"\xff", b"{}", b"[" * 9999, b'{"pid": "1"}', b'{"since": NaN}']
)
def test_a_damaged_lease_counts_as_one_of_another_machine(content: bytes, tmp_path: pathlib.Path):
  (tmp_path / ".lease").write_bytes(content)
  waiting = of(tmp_path)
  assert waiting.attempt() > 0
  (tmp_path / ".lease").write_bytes(content + b" ")
  with pytest.raises(errors.CalmError, match=r"by a process that .*lease does not name"):
    waiting.attempt()
  with of(tmp_path):
    assert read(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize(
  "change",
  [
    {"since": float("inf")},
    {"since": "now"},
    {"pid": -1},
    {"pid": 2**40},
    {"host": "a\nb"},
    {"more": 1},
  ],
  ids=str,
)
def test_values_that_no_process_writes_are_not_a_holder(change: dict):
  values = dataclasses.asdict(holder.Holder.here())
  assert holder.Holder.parse(json.dumps(values).encode())
  assert holder.Holder.parse(json.dumps(values | change).encode()) is None


RACE = """
import pathlib, sys, time
from calm_jax import errors, lease
root, me, other, rounds = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

def meet(name):
  (root / f"{name}.{me}").touch()
  while not (root / f"{name}.{other}").exists():
    time.sleep(0.0001)

for number in range(rounds):
  held = lease.Lease(lease.of_folder(root / f"folder{number}"), "--output=x")
  meet(f"ready{number}")
  try:
    while wait := held.attempt():
      time.sleep(wait)
    won = 1
  except errors.CalmError as error:
    assert "is being written by" in str(error), error
    won = 0
  print(won, flush=True)
  meet(f"tried{number}")
  held.release()
"""


def test_exactly_one_of_two_simultaneous_processes_gets_the_lease(tmp_path: pathlib.Path):
  """In folders that do not exist yet, and in folders whose last holder was killed."""
  rounds = 40
  for number in range(0, rounds, 2):
    (tmp_path / f"folder{number}").mkdir()
    write(tmp_path / f"folder{number}", started=1)
  processes = [
    start(sys.executable, "-c", RACE, tmp_path, me, other, rounds) for me, other in ("ab", "ba")
  ]
  ended = [finish(process) for process in processes]
  assert [(code, output) for code, _, output in ended] == [(0, "")] * 2
  won = [list(map(int, output.split())) for _, output, _ in ended]
  assert [sum(x) for x in zip(*won, strict=True)] == [1] * rounds
  assert not list(tmp_path.glob("folder*/.lease"))


def stop_between_beats(process: subprocess.Popen, folder: pathlib.Path) -> None:
  """Suspends a process while it is not writing its lease, which would lock the file."""
  while True:
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    if not (folder / ".lease.__lock").exists():
      return
    process.send_signal(signal.SIGCONT)


def test_a_lease_whose_write_got_no_answer_belongs_to_its_writer(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  folder_lease, write = of(tmp_path), lease.Lease._write

  def lost(self, content, generation):
    monkeypatch.setattr(lease.Lease, "_write", write)
    write(self, content, generation)
    raise errors.CalmError("no answer")

  monkeypatch.setattr(lease.Lease, "_write", lost)
  with folder_lease:
    folder_lease.require_held()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ended", [False, True], ids=["holds it", "gave it back"])
def test_a_suspended_process_learns_that_another_took_over(ended: bool, tmp_path: pathlib.Path):
  with holding(tmp_path, "far") as process:
    stop_between_beats(process, tmp_path)
    with of(tmp_path) as folder_lease:
      if ended:
        folder_lease.release()
      process.send_signal(signal.SIGCONT)
      output, _ = process.communicate("\n", timeout=60)
      folder_lease.require_held()
  assert f"--output={tmp_path} was taken over by " in output
  assert ("a process that has ended" if ended else f"process {os.getpid()} on ") in output
  assert not list(tmp_path.iterdir())


def test_a_lease_that_another_process_took_is_left_alone(tmp_path: pathlib.Path):
  with of(tmp_path) as folder_lease:
    write(tmp_path, host="far")
    folder_lease._renew()
    with pytest.raises(errors.CalmError, match=r"was taken over by process .* on far"):
      folder_lease.require_held()
  assert read(tmp_path)["host"] == "far"


@pytest.mark.parametrize("harm", [os.remove, lambda path: pathlib.Path(path).write_text("{")])
def test_a_lease_removed_or_damaged_by_hand_is_still_held(
  harm: Callable[[str], None], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(lease, "EXPIRE", 60.0)
  with of(tmp_path) as folder_lease:
    harm(f"{tmp_path}/.lease")
    folder_lease._renew()
    folder_lease.require_held()
    assert read(tmp_path)["pid"] == os.getpid()
  assert not (tmp_path / ".lease").exists()


def test_heartbeats_continue_after_disk_errors(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  with of(tmp_path) as folder_lease:
    failed = threading.Event()

    class Full:
      def write(self, *_, **__):
        failed.set()
        raise ValueError("no space left on device")

    with monkeypatch.context() as patch:
      patch.setattr(folder_lease, "_store", Full())
      assert failed.wait(30)
    before = read(tmp_path)["beat"]
    deadline = time.monotonic() + 30
    while read(tmp_path)["beat"] == before:
      assert time.monotonic() < deadline
      time.sleep(0.01)
    folder_lease.require_held()


def test_a_lease_does_not_keep_its_process_alive_and_is_released_at_its_end(
  tmp_path: pathlib.Path,
):
  process = start(sys.executable, "-c", HOLDER, tmp_path, "")
  process.stdin = None
  assert finish(process) == (0, "held\n", "")
  assert not list(tmp_path.iterdir())


ENDED = """
import pathlib, signal, sys, time
from calm_jax import config
from calm_jax.running import train
from calm_jax.training import guard
with guard.Guard(config.Limits()) as guarded, train._leased(sys.argv[1]):
  guarded.stop.unsaved = False
  assert pathlib.Path(sys.argv[1], ".lease").exists()
  signal.raise_signal(signal.SIGTERM)
  time.sleep(100)
"""


def test_a_process_that_exits_immediately_releases_its_lease_too(tmp_path: pathlib.Path):
  """Otherwise the next process, on another machine, would have to wait."""
  code, _, output = finish(start(sys.executable, "-c", ENDED, tmp_path / "run"))
  assert (code, output.count("\n")) == (errors.EXIT_RESTART, 1), output
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["/dev/null/store", "/proc/store", "nothing://b/store"])
def test_a_place_where_no_lease_can_be_written_is_reported_in_one_line(place: str):
  reason = f"^can't write {place}/.lease: "
  with pytest.raises(errors.CalmError, match=reason) as caught, of(place):
    pass
  assert "\n" not in str(caught.value)


# Acts.


def test_two_simultaneous_prepares_leave_one_store(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(writers, "DOCUMENTS", 3000)
  report = writers.run("prepare", pairs=1, seed=0, root=tmp_path)
  assert not report["harmed"], report


def test_an_output_in_use_is_refused_and_a_finished_store_is_reused(
  tokens: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
  source = pathlib.Path(tokens).parent / "cats.jsonl"
  settings = prepare.Settings((str(source),), tokens, "train:300", heldout=0.2, workers=1)
  with of(pathlib.Path(tokens)):
    prepare.prepare(settings)
  assert "exists already" in capsys.readouterr().err
  new = dataclasses.replace(settings, output=str(tmp_path))
  with of(tmp_path), pytest.raises(errors.CalmError, match="is being written by process"):
    prepare.prepare(new)
  assert not list(tmp_path.iterdir())


def test_a_workdir_in_use_can_be_read_but_not_trained(
  autoencoder_run, trained_autoencoder: pathlib.Path
):
  before = {path: path.stat().st_mtime_ns for path in trained_autoencoder.rglob("*")}
  with of(trained_autoencoder):
    with pytest.raises(errors.CalmError, match=r"^--workdir=.* is being written by process"):
      train.train_run(autoencoder_run, str(trained_autoencoder))
    assert loading.load(str(trained_autoencoder)).step == autoencoder_run.training.steps
    train.train_run(autoencoder_run, str(trained_autoencoder), train.Options(dry_run=True))
  assert {path: path.stat().st_mtime_ns for path in trained_autoencoder.rglob("*")} == before


def test_a_run_whose_workdir_was_taken_over_stops_writing(
  autoencoder_run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  folder = tmp_path / "run"

  def take_over() -> None:
    # `write` takes no lock, so a heartbeat under way may replace what it wrote.
    while read(folder)["host"] != "far":
      write(folder, host="far")
      time.sleep(1)

  at_step(monkeypatch, 3, take_over)
  with pytest.raises(errors.CalmError, match=r"taken over by process .* on far"):
    train.train_run(autoencoder_run, str(folder))
  records = map(json.loads, (folder / workdir.METRICS).read_text().splitlines())
  assert max(record["step"] for record in records) <= 3
  assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]
  assert read(folder)["host"] == "far"


def test_an_output_of_texts_in_use_is_refused_before_the_model_is_loaded(
  tmp_path: pathlib.Path,
):
  output = tmp_path / "texts.jsonl"
  command = [sys.executable, "-m", "calm_jax.generate", "--workdir=nowhere", "--prompts=x"]
  with lease.Lease(lease.of_file(output), f"--output={output}"):
    code, _, stderr = finish(start(*command, f"--output={output}"))
  assert code == 2 and stderr.count("\n") == 1
  assert stderr.startswith(
    f"error: --output={output} is being written by process {os.getpid()} on "
  )
  assert not list(tmp_path.iterdir())
