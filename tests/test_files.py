"""Claims about files: writes are atomic, reads never block, bad JSON is one line of error."""

import concurrent.futures
import hashlib
import os
import pathlib

import pytest

from calm_jax import errors, files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  path = tmp_path / "x.json"
  files.write(path, "old")

  def full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(errors.CalmError, match=r"can.t write .*x.json: .*No space left"):
    files.write(path, "new")
  assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]


def test_a_written_file_and_its_folder_are_flushed(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  synced, fsync = [], os.fsync

  def note(descriptor: int) -> None:
    synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
    fsync(descriptor)

  monkeypatch.setattr(os, "fsync", note)
  files.write(tmp_path / "x", b"content")
  assert synced == [f"{tmp_path}/x.{os.getpid()}.tmp", str(tmp_path)]


@pytest.mark.parametrize("reader", [files.read, files.digest, files.read_json])
def test_a_pipe_a_device_and_a_folder_are_refused_and_do_not_block(reader, tmp_path: pathlib.Path):
  os.mkfifo(tmp_path / "pipe")
  for path, kind in ((tmp_path / "pipe", "pipe"), ("/dev/zero", "pipe"), (tmp_path, "folder")):
    with pytest.raises(errors.CalmError, match=rf"{path} is a {kind}.*not a file"):
      reader(path)
  with pytest.raises(errors.CalmError, match=r"can.t read .*missing"):
    reader(tmp_path / "missing")


def test_a_path_without_permission_does_not_count_as_missing(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  def locked(path):
    raise PermissionError(13, "Permission denied", path)

  files.require_reachable(str(tmp_path / "missing"))
  monkeypatch.setattr(os, "stat", locked)
  with pytest.raises(errors.CalmError, match=r"can't reach .*x: .*Permission denied"):
    files.require_reachable(str(tmp_path / "x"))


def test_a_digest_is_that_of_the_bytes(tmp_path: pathlib.Path):
  content = bytes(range(256)) * 8192
  (tmp_path / "x").write_bytes(content)
  expected = hashlib.sha256(content).hexdigest()
  assert files.digest(tmp_path / "x") == expected
  files.require_digest(tmp_path / "x", expected, "seal.json says", "put it back")
  reason = f"x has SHA-256 {expected[:16]}, but seal.json says {16 * '0'}: put it back"
  with pytest.raises(errors.CalmError, match=reason):
    files.require_digest(tmp_path / "x", 64 * "0", "seal.json says", "put it back")


@pytest.mark.parametrize(
  "text, reason",
  [
    (b"{", "not valid JSON"),
    (b'"\xff"', "not valid JSON"),
    (b'{"a": ' + b"[" * 10**6, "not valid JSON: nested too deep"),
    (b"[1]", "must hold a JSON object, got list"),
    (b'"x"', "must hold a JSON object, got str"),
    (b'{"a": %s}' % (b"1" * 5000), "not valid JSON"),  # Python reads integers of 4,300 digits.
  ],
)
def test_json_that_is_no_object_is_reported_with_its_path(
  text: bytes, reason: str, tmp_path: pathlib.Path
):
  (tmp_path / "x.json").write_bytes(text)
  with pytest.raises(errors.CalmError, match=f"x.json (is )?{reason}"):
    files.read_json(tmp_path / "x.json")


def test_long_lines_of_two_writers_do_not_mix(tmp_path: pathlib.Path):
  """A line longer than a buffer of 8 KB used to be written in pieces."""
  path, lines = tmp_path / "x", [letter * 100_000 + "\n" for letter in "ab"]

  def write(line: str) -> None:
    for _ in range(50):
      files.append(path, line)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(write, lines))
  assert set(path.read_text().splitlines(keepends=True)) == set(lines)
