"""Claims about verify: it lists the checks, and names the first difference."""

import pathlib
import shutil
from collections.abc import Callable

import pytest

from calm_jax import errors, verify, workdir_checks
from calm_jax.running import conversion
from calm_jax.training import checkpoint


@pytest.fixture
def places(
  tokens: str, trained_calm: pathlib.Path, tmp_path: pathlib.Path
) -> dict[str, pathlib.Path]:
  """A folder of each kind, for tests to damage."""
  folders = {name: tmp_path / name for name in ("store", "workdir", "exported")}
  shutil.copytree(tokens, folders["store"])
  shutil.copytree(trained_calm, folders["workdir"])
  conversion.convert(str(trained_calm), str(folders["exported"]), "reference")
  return folders


def lines(path: pathlib.Path) -> list[str]:
  shown: list[str] = []
  verify.verify(str(path), shown.append)
  return shown


def flip_a_bit(path: pathlib.Path) -> None:
  content = path.read_bytes()
  middle = len(content) // 2
  path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def test_the_checks_of_intact_folders_are_listed(places: dict[str, pathlib.Path]):
  first, *_, last = lines(places["store"])
  assert first == f"token store {places['store']}" and last == "7 checks, all as written"
  report = "\n".join(lines(places["workdir"]))
  for name in ("seal.json", "origin.json", "autoencoder/config.json", "checkpoints/6", "metrics"):
    assert f"\n  {name}" in report
  report = "\n".join(lines(places["exported"]))
  assert report.startswith("exported folder") and "\n  checksums" in report


def _newest(folder: pathlib.Path) -> pathlib.Path:
  """Returns the largest file of the newest checkpoint's parameters."""
  newest = max((folder / "checkpoints").iterdir(), key=lambda place: int(place.name))
  return max(newest.glob("params/**/d/*"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
  ("kind", "damaged", "named"),
  [
    ("store", lambda folder: folder / "train/offsets/c/0", "train/offsets"),
    ("store", lambda folder: folder / "plan.json", "plan.json"),
    ("workdir", lambda folder: folder / "config.json", "config.json"),
    ("workdir", lambda folder: folder / "autoencoder/origin.json", "autoencoder"),
    ("workdir", _newest, "checkpoints/6"),
    ("workdir", lambda folder: _newest(folder / "autoencoder"), "autoencoder"),
    ("exported", lambda folder: folder / "model.safetensors", "model.safetensors"),
    ("exported", lambda folder: folder / "tokenizer.model", "tokenizer.model"),
  ],
)
def test_the_first_difference_is_named(
  kind: str,
  damaged: Callable[[pathlib.Path], pathlib.Path],
  named: str,
  places: dict[str, pathlib.Path],
):
  flip_a_bit(damaged(places[kind]))
  with pytest.raises(errors.CalmError, match=named) as caught:
    lines(places[kind])
  assert "\n" not in str(caught.value)


def test_a_workdir_with_a_file_of_checksums_is_still_checked_as_a_workdir(
  places: dict[str, pathlib.Path],
):
  (places["workdir"] / "SHA256SUMS").write_text("")
  assert lines(places["workdir"])[0].startswith("workdir")


def test_a_checkpoint_that_its_run_removes_during_verify_is_not_an_error(
  places: dict[str, pathlib.Path], monkeypatch: pytest.MonkeyPatch
):
  steps_in = checkpoint.steps_in
  once = [[3, *steps_in(str(places["workdir"]))]]
  monkeypatch.setattr(
    workdir_checks.checkpoint,
    "steps_in",
    lambda path: once.pop() if once and path == str(places["workdir"]) else steps_in(path),
  )
  assert "removed by the run in the meantime" in "\n".join(lines(places["workdir"]))


def test_a_folder_of_an_unknown_kind_is_refused(tmp_path: pathlib.Path):
  with pytest.raises(errors.CalmError, match="is not a token store or workdir or exported folder"):
    lines(tmp_path)
  with pytest.raises(errors.CalmError, match="x does not exist"):
    lines(tmp_path / "x")
