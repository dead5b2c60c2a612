"""Claims about checkpoints: complete or absent, damage is detected, the last intact one is used."""

import json
import pathlib
import resource
import shutil

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import errors, sealed_json
from calm_jax.training import checkpoint

SIZE = 5000


def params(step: int):
  return {"w": jax.random.normal(jax.random.key(step), (SIZE,))}


def rest(step: int):
  return {"step": jnp.int32(step), "mean": {"w": jnp.full((3, 2), step, jnp.bfloat16)}}


def save_steps(directory: pathlib.Path, *steps: int, **options) -> list[str]:
  """Saves steps one after the other and returns the reported lines."""
  reports: list[str] = []
  options = {"keep_latest": 1} | options
  checkpoints = checkpoint.Checkpoints(str(directory), report=reports.append, **options)
  for step in steps:
    record = {"data": {"next": 10 * step}, "seal": "own"}
    checkpoints.save(step, params(step), rest(step), record)
    checkpoints.wait()
  checkpoints.close()
  return reports


def abstract(tree):
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def restore(directory: pathlib.Path, with_rest: bool = True, bound: str = ""):
  """Returns the restored checkpoint and the reported lines."""
  reports: list[str] = []
  checkpoints = checkpoint.Checkpoints(str(directory), report=reports.append)
  try:
    trees = [abstract(jax.eval_shape(make, 0)) for make in (params, rest)]
    return checkpoints.restore(*trees[: 1 + with_rest], bound=bound), reports
  finally:
    checkpoints.close()


def assert_step(loaded: checkpoint.Restored | None, step: int):
  assert loaded is not None and loaded.step == step
  np.testing.assert_array_equal(loaded.params["w"], params(step)["w"])


def damage(directory: pathlib.Path, step: int):
  """Changes one byte in the middle of every data file of the parameters."""
  files = [p for p in (directory / f"checkpoints/{step}/params/d").iterdir() if p.stat().st_size]
  assert files
  for file in files:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_checkpoint_reads_back_as_saved(tmp_path: pathlib.Path):
  assert save_steps(tmp_path, 7) == []
  loaded, reports = restore(tmp_path)
  assert_step(loaded, 7)
  assert loaded.meta["data"] == {"next": 70} and reports == []
  jax.tree.map(np.testing.assert_array_equal, loaded.rest, rest(7))
  assert loaded.rest["mean"]["w"].dtype == jnp.bfloat16


def test_parameters_can_be_read_alone(tmp_path: pathlib.Path):
  save_steps(tmp_path, 7)
  loaded, _ = restore(tmp_path, with_rest=False)
  assert_step(loaded, 7)
  assert loaded.rest is None


def test_without_a_checkpoint_none_is_restored(tmp_path: pathlib.Path):
  assert restore(tmp_path) == (None, [])


def test_the_latest_two_and_every_third_checkpoint_are_kept(tmp_path: pathlib.Path):
  save_steps(tmp_path, *range(1, 8), keep_latest=2, keep_every=3)
  remaining = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  assert remaining == [3, 6, 7]


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(tmp_path: pathlib.Path):
  save_steps(tmp_path, 1, 2, 3, keep_latest=3)
  damage(tmp_path, 3)
  loaded, reports = restore(tmp_path)
  assert_step(loaded, 2)
  assert len(reports) == 1 and "step 3" in reports[0] and "falling back" in reports[0]


def test_a_missing_file_counts_as_damage(tmp_path: pathlib.Path):
  save_steps(tmp_path, 1, 2, keep_latest=2)
  (tmp_path / "checkpoints/2/rest/manifest.ocdbt").unlink()
  loaded, reports = restore(tmp_path)
  assert_step(loaded, 1)
  assert "step 2" in reports[0]


def test_fingerprints_detect_damage_that_the_format_does_not(tmp_path: pathlib.Path):
  """Parameters of another checkpoint read back without an error."""
  save_steps(tmp_path, 1, 2, keep_latest=2)
  shutil.rmtree(tmp_path / "checkpoints/2/params")
  shutil.copytree(tmp_path / "checkpoints/1/params", tmp_path / "checkpoints/2/params")
  loaded, reports = restore(tmp_path)
  assert_step(loaded, 1)
  assert "damaged" in reports[0]


def test_if_all_checkpoints_are_damaged_their_steps_are_named(tmp_path: pathlib.Path):
  save_steps(tmp_path, 1, 2, keep_latest=2)
  damage(tmp_path, 1)
  damage(tmp_path, 2)
  with pytest.raises(errors.CalmError, match=r"none of the checkpoints .* \(steps \[1, 2\]\)"):
    restore(tmp_path)


def test_an_interrupted_save_is_not_a_checkpoint(tmp_path: pathlib.Path):
  save_steps(tmp_path, 1)
  (tmp_path / "checkpoints/2.orbax-checkpoint-tmp/params").mkdir(parents=True)
  assert_step(restore(tmp_path)[0], 1)


def test_a_full_disk_is_reported_and_keeps_the_previous_checkpoint(tmp_path: pathlib.Path):
  save_steps(tmp_path, 1)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, hard))  # A quarter of the parameters.
  try:
    reports = save_steps(tmp_path, 2, keep_latest=2)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert reports and "failed" in reports[0] and "the last good one is step 1" in reports[-1]
  assert_step(restore(tmp_path)[0], 1)


def test_a_save_after_a_failed_save_succeeds(tmp_path: pathlib.Path):
  reports: list[str] = []
  checkpoints = checkpoint.Checkpoints(str(tmp_path), keep_latest=2, report=reports.append)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, hard))
  try:
    checkpoints.save(1, params(1), rest(1), {})
    assert not checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert "failed" in reports[0]
  assert checkpoints.save(2, params(2), rest(2), {}) and checkpoints.wait()
  checkpoints.close()
  assert_step(restore(tmp_path)[0], 2)


def test_checkpoints_newer_than_a_step_are_set_aside(tmp_path: pathlib.Path):
  save_steps(tmp_path, 1, 2, 3, keep_latest=3)
  checkpoints = checkpoint.Checkpoints(str(tmp_path), keep_latest=3, report=lambda line: None)
  checkpoints.set_aside_after(1)
  assert checkpoints.steps() == [1]
  checkpoints.close()
  assert {p.name for p in (tmp_path / "checkpoints_unreadable").iterdir()} == {"2", "3"}


def edit_meta(directory: pathlib.Path, step: int, edit, rehash: bool = False) -> None:
  """Edits a checkpoint's metadata; with `rehash` its hash is updated too."""
  (path,) = (directory / f"checkpoints/{step}/meta").glob("metadata*")
  values = json.loads(path.read_text())
  edit(values)
  if rehash:
    values = sealed_json.sealed(
      {name: x for name, x in values.items() if name != sealed_json.FIELD}
    )
  path.write_text(json.dumps(values))


def test_an_edited_data_position_counts_as_damage(tmp_path: pathlib.Path):
  save_steps(tmp_path, 1, 2, keep_latest=2)
  edit_meta(tmp_path, 2, lambda values: values["data"].update(next=21))
  loaded, reports = restore(tmp_path)
  assert_step(loaded, 1)
  assert "its meta was changed since it was saved" in reports[0]


def test_a_checkpoint_of_another_run_is_refused_and_no_older_one_is_used(tmp_path: pathlib.Path):
  save_steps(tmp_path, 1, 2, keep_latest=2)
  assert_step(restore(tmp_path, bound="own")[0], 2)
  edit_meta(tmp_path, 2, lambda values: values.update(seal="other"), rehash=True)
  with pytest.raises(errors.CalmError, match=r"checkpoints/2 is a checkpoint of another run: put"):
    restore(tmp_path, bound="own")


def test_a_checkpoint_renamed_to_another_step_is_refused(tmp_path: pathlib.Path):
  save_steps(tmp_path, 1, 2, keep_latest=2)
  shutil.rmtree(tmp_path / "checkpoints/2")
  (tmp_path / "checkpoints/1").rename(tmp_path / "checkpoints/2")
  with pytest.raises(errors.CalmError, match=r"checkpoints/2 holds the checkpoint of step 1: put"):
    restore(tmp_path)


@pytest.mark.parametrize(
  "error",
  [
    PermissionError(13, "Permission denied"),
    OSError(5, "Input/output error"),
    ValueError('PERMISSION_DENIED: Failed to open "d" [OS error 13: EACCES Permission denied]'),
    ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte."),
  ],
)
def test_temporarily_unreadable_files_do_not_count_as_damage(error, tmp_path, monkeypatch):
  save_steps(tmp_path, 1, 2, keep_latest=2)

  def fail(self, step, *others):
    raise ValueError("reading failed") from error

  monkeypatch.setattr(checkpoint.Checkpoints, "_read", fail)
  with pytest.raises(errors.CalmError, match=r"step 2 .* can't be read now .*nothing was changed"):
    restore(tmp_path)
  assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}


def test_a_checkpoint_removed_during_a_read_makes_the_search_restart(tmp_path, monkeypatch):
  """The trainer in another process keeps only the latest checkpoint."""
  save_steps(tmp_path, 1)
  read = checkpoint.Checkpoints._read

  def read_after_save(self, step, *others):
    if step == 1:
      save_steps(tmp_path, 2)
      assert not (tmp_path / "checkpoints/1").exists()
    return read(self, step, *others)

  monkeypatch.setattr(checkpoint.Checkpoints, "_read", read_after_save)
  loaded, reports = restore(tmp_path)
  assert_step(loaded, 2)
  assert reports == []


@pytest.mark.parametrize("name", ["lr[1e-3]", "a[", "a]", "a*b", "why?", "back\\slash", "a**b"])
def test_a_path_that_would_be_read_as_a_pattern_is_refused(name: str, tmp_path: pathlib.Path):
  for place in (tmp_path / name, tmp_path / name / "run"):
    with pytest.raises(errors.CalmError, match="is read as a pattern; give another") as caught:
      save_steps(place, 1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / name).exists()


def test_a_checkpoint_that_does_not_read_back_is_refused_and_set_aside(tmp_path: pathlib.Path):
  checkpoints = checkpoint.Checkpoints(str(tmp_path), keep_latest=3, report=lambda line: None)
  for step in (1, 2):
    assert checkpoints.save(step, params(step), rest(step), {}) and checkpoints.wait()
    if step == 1:
      checkpoints.prove()
  damage(tmp_path, 2)
  with pytest.raises(errors.CalmError, match=r"step 2 was saved .* can't be read back"):
    checkpoints.prove()
  assert checkpoints.steps() == [1]
  checkpoints.close()


def test_a_checkpoint_that_reads_back_with_other_values_is_refused(tmp_path: pathlib.Path):
  checkpoints = checkpoint.Checkpoints(str(tmp_path), keep_latest=3, report=lambda line: None)
  for step in (1, 2):
    assert checkpoints.save(step, params(step), rest(step), {}) and checkpoints.wait()
  shutil.rmtree(tmp_path / "checkpoints/2/rest")
  shutil.copytree(tmp_path / "checkpoints/1/rest", tmp_path / "checkpoints/2/rest")
  with pytest.raises(errors.CalmError, match="rest mean/w is not what was saved"):
    checkpoints.prove()
  checkpoints.close()


def test_a_folder_of_a_later_step_is_set_aside_before_a_save(tmp_path: pathlib.Path):
  save_steps(tmp_path, 1)
  (tmp_path / "checkpoints/9").mkdir()
  reports = save_steps(tmp_path, 2, keep_latest=2)
  assert_step(restore(tmp_path)[0], 2)
  assert "moved the checkpoint of step 9" in reports[0]


def test_a_file_instead_of_a_checkpoint_is_reported(tmp_path: pathlib.Path):
  save_steps(tmp_path, 1)
  (tmp_path / "checkpoints/9").write_text("")
  loaded, reports = restore(tmp_path)
  assert_step(loaded, 1)
  assert reports == [f"{tmp_path}/checkpoints/9 is a file, not a checkpoint"]


def test_a_save_that_orbax_skips_is_reported_as_failed(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", lambda *args, **named: False)
  reports: list[str] = []
  checkpoints = checkpoint.Checkpoints(str(tmp_path), keep_latest=1, report=reports.append)
  assert not checkpoints.save(1, params(1), rest(1), {})
  checkpoints.close()
  assert "saving the checkpoint of step 1 failed" in reports[0]


def test_only_finite_trees_are_all_finite():
  good = {"w": jnp.ones((8, 2)), "half": jnp.ones((3,), jnp.bfloat16), "step": jnp.int32(3)}
  assert checkpoint.all_finite(good) and checkpoint.all_finite({"step": jnp.int32(3)})
  for name, value in (("w", jnp.nan), ("half", -jnp.inf)):
    assert not checkpoint.all_finite({**good, name: good[name].at[0].set(value)})
