"""Claims about checkpoints: whole or not at all, damage found, the last good one kept."""

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


def saved(directory: pathlib.Path, *steps: int, **options) -> list[str]:
  """Saves steps one after the other and returns what was reported."""
  said: list[str] = []
  options = {"keep_latest": 1} | options
  checkpoints = checkpoint.Checkpoints(str(directory), report=said.append, **options)
  for step in steps:
    record = {"data": {"next": 10 * step}, "seal": "own"}
    checkpoints.save(step, params(step), rest(step), record)
    checkpoints.wait()
  checkpoints.close()
  return said


def abstract(tree):
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def restored(directory: pathlib.Path, with_rest: bool = True, bound: str = ""):
  """Returns what is restored, and what was reported."""
  said: list[str] = []
  checkpoints = checkpoint.Checkpoints(str(directory), report=said.append)
  try:
    trees = [abstract(jax.eval_shape(make, 0)) for make in (params, rest)]
    return checkpoints.restore(*trees[: 1 + with_rest], bound=bound), said
  finally:
    checkpoints.close()


def assert_step(found: checkpoint.Restored | None, step: int):
  assert found is not None and found.step == step
  np.testing.assert_array_equal(found.params["w"], params(step)["w"])


def damage(directory: pathlib.Path, step: int):
  """Changes one byte in the middle of every data file of the parameters."""
  files = [p for p in (directory / f"checkpoints/{step}/params/d").iterdir() if p.stat().st_size]
  assert files
  for file in files:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_what_is_saved_comes_back(tmp_path: pathlib.Path):
  assert saved(tmp_path, 7) == []
  found, said = restored(tmp_path)
  assert_step(found, 7)
  assert found.meta["data"] == {"next": 70} and said == []
  jax.tree.map(np.testing.assert_array_equal, found.rest, rest(7))
  assert found.rest["mean"]["w"].dtype == jnp.bfloat16


def test_parameters_can_be_read_alone(tmp_path: pathlib.Path):
  saved(tmp_path, 7)
  found, _ = restored(tmp_path, with_rest=False)
  assert_step(found, 7)
  assert found.rest is None


def test_without_a_checkpoint_there_is_none(tmp_path: pathlib.Path):
  assert restored(tmp_path) == (None, [])


def test_the_latest_and_every_third_are_kept(tmp_path: pathlib.Path):
  saved(tmp_path, *range(1, 8), keep_latest=2, keep_every=3)
  kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  assert kept == [3, 6, 7]


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(tmp_path: pathlib.Path):
  saved(tmp_path, 1, 2, 3, keep_latest=3)
  damage(tmp_path, 3)
  found, said = restored(tmp_path)
  assert_step(found, 2)
  assert len(said) == 1 and "step 3" in said[0] and "falling back" in said[0]


def test_a_file_that_is_gone_counts_as_damage(tmp_path: pathlib.Path):
  saved(tmp_path, 1, 2, keep_latest=2)
  (tmp_path / "checkpoints/2/rest/manifest.ocdbt").unlink()
  found, said = restored(tmp_path)
  assert_step(found, 1)
  assert "step 2" in said[0]


def test_a_fingerprint_finds_what_the_format_does_not(tmp_path: pathlib.Path):
  """A checkpoint whose parameters are not those that were saved reads back without an error."""
  saved(tmp_path, 1, 2, keep_latest=2)
  shutil.rmtree(tmp_path / "checkpoints/2/params")
  shutil.copytree(tmp_path / "checkpoints/1/params", tmp_path / "checkpoints/2/params")
  found, said = restored(tmp_path)
  assert_step(found, 1)
  assert "damaged" in said[0]


def test_if_every_checkpoint_is_damaged_the_steps_are_named(tmp_path: pathlib.Path):
  saved(tmp_path, 1, 2, keep_latest=2)
  damage(tmp_path, 1)
  damage(tmp_path, 2)
  with pytest.raises(errors.CalmError, match=r"none of the checkpoints .* \(steps \[1, 2\]\)"):
    restored(tmp_path)


def test_a_save_cut_short_is_no_checkpoint(tmp_path: pathlib.Path):
  saved(tmp_path, 1)
  (tmp_path / "checkpoints/2.orbax-checkpoint-tmp/params").mkdir(parents=True)
  assert_step(restored(tmp_path)[0], 1)


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(tmp_path: pathlib.Path):
  saved(tmp_path, 1)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, hard))  # A quarter of the parameters.
  try:
    said = saved(tmp_path, 2, keep_latest=2)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert said and "failed" in said[0] and "the last good one is step 1" in said[-1]
  assert_step(restored(tmp_path)[0], 1)


def test_a_save_after_a_failed_one_counts_by_itself(tmp_path: pathlib.Path):
  said: list[str] = []
  checkpoints = checkpoint.Checkpoints(str(tmp_path), keep_latest=2, report=said.append)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, hard))
  try:
    checkpoints.save(1, params(1), rest(1), {})
    assert not checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert "failed" in said[0]
  assert checkpoints.save(2, params(2), rest(2), {}) and checkpoints.wait()
  checkpoints.close()
  assert_step(restored(tmp_path)[0], 2)


def test_what_is_newer_than_a_step_is_set_aside(tmp_path: pathlib.Path):
  saved(tmp_path, 1, 2, 3, keep_latest=3)
  checkpoints = checkpoint.Checkpoints(str(tmp_path), keep_latest=3, report=lambda line: None)
  checkpoints.set_aside_after(1)
  assert checkpoints.steps() == [1]
  checkpoints.close()
  assert {p.name for p in (tmp_path / "checkpoints_unreadable").iterdir()} == {"2", "3"}


def edit_meta(directory: pathlib.Path, step: int, edit, rehash: bool = False) -> None:
  """Edits a checkpoint's meta; with `rehash` as somebody who knows of its hash."""
  (path,) = (directory / f"checkpoints/{step}/meta").glob("metadata*")
  values = json.loads(path.read_text())
  edit(values)
  if rehash:
    values = sealed_json.sealed(
      {name: x for name, x in values.items() if name != sealed_json.FIELD}
    )
  path.write_text(json.dumps(values))


def test_a_position_that_was_edited_is_not_believed(tmp_path: pathlib.Path):
  saved(tmp_path, 1, 2, keep_latest=2)
  edit_meta(tmp_path, 2, lambda values: values["data"].update(next=21))
  found, said = restored(tmp_path)
  assert_step(found, 1)
  assert "its meta was changed since it was saved" in said[0]


def test_a_checkpoint_of_another_run_is_refused_and_no_older_one_taken(tmp_path: pathlib.Path):
  saved(tmp_path, 1, 2, keep_latest=2)
  assert_step(restored(tmp_path, bound="own")[0], 2)
  edit_meta(tmp_path, 2, lambda values: values.update(seal="other"), rehash=True)
  with pytest.raises(errors.CalmError, match=r"checkpoints/2 is a checkpoint of another run: put"):
    restored(tmp_path, bound="own")


def test_a_checkpoint_under_another_step_s_name_is_refused(tmp_path: pathlib.Path):
  saved(tmp_path, 1, 2, keep_latest=2)
  shutil.rmtree(tmp_path / "checkpoints/2")
  (tmp_path / "checkpoints/1").rename(tmp_path / "checkpoints/2")
  with pytest.raises(errors.CalmError, match=r"checkpoints/2 holds the checkpoint of step 1: put"):
    restored(tmp_path)


@pytest.mark.parametrize(
  "error",
  [
    PermissionError(13, "Permission denied"),
    OSError(5, "Input/output error"),
    ValueError('PERMISSION_DENIED: Failed to open "d" [OS error 13: EACCES Permission denied]'),
    ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte."),
  ],
)
def test_what_can_t_be_read_now_is_no_damage(error, tmp_path, monkeypatch):
  saved(tmp_path, 1, 2, keep_latest=2)

  def fails(self, step, *others):
    raise ValueError("reading failed") from error

  monkeypatch.setattr(checkpoint.Checkpoints, "_read", fails)
  with pytest.raises(errors.CalmError, match=r"step 2 .* can't be read now .*nothing was changed"):
    restored(tmp_path)
  assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}


def test_one_that_goes_while_it_is_read_is_looked_for_again(tmp_path, monkeypatch):
  """The trainer of another process keeps the latest only."""
  saved(tmp_path, 1)
  read = checkpoint.Checkpoints._read

  def overtaken(self, step, *others):
    if step == 1:
      saved(tmp_path, 2)
      assert not (tmp_path / "checkpoints/1").exists()
    return read(self, step, *others)

  monkeypatch.setattr(checkpoint.Checkpoints, "_read", overtaken)
  found, said = restored(tmp_path)
  assert_step(found, 2)
  assert said == []


@pytest.mark.parametrize("name", ["lr[1e-3]", "a[", "a]", "a*b", "why?", "back\\slash", "a**b"])
def test_a_path_that_would_be_read_as_a_pattern_is_refused(name: str, tmp_path: pathlib.Path):
  for place in (tmp_path / name, tmp_path / name / "run"):
    with pytest.raises(errors.CalmError, match="is read as a pattern; give another") as caught:
      saved(place, 1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / name).exists()


def test_a_checkpoint_that_does_not_read_back_is_told_and_set_aside(tmp_path: pathlib.Path):
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


def test_a_checkpoint_that_reads_back_as_other_values_is_told(tmp_path: pathlib.Path):
  checkpoints = checkpoint.Checkpoints(str(tmp_path), keep_latest=3, report=lambda line: None)
  for step in (1, 2):
    assert checkpoints.save(step, params(step), rest(step), {}) and checkpoints.wait()
  shutil.rmtree(tmp_path / "checkpoints/2/rest")
  shutil.copytree(tmp_path / "checkpoints/1/rest", tmp_path / "checkpoints/2/rest")
  with pytest.raises(errors.CalmError, match="rest mean/w is not what was saved"):
    checkpoints.prove()
  checkpoints.close()


def test_a_newer_folder_in_the_way_of_a_save_is_set_aside(tmp_path: pathlib.Path):
  saved(tmp_path, 1)
  (tmp_path / "checkpoints/9").mkdir()
  said = saved(tmp_path, 2, keep_latest=2)
  assert_step(restored(tmp_path)[0], 2)
  assert "moved the checkpoint of step 9" in said[0]


def test_a_file_in_the_place_of_a_checkpoint_is_told(tmp_path: pathlib.Path):
  saved(tmp_path, 1)
  (tmp_path / "checkpoints/9").write_text("")
  found, said = restored(tmp_path)
  assert_step(found, 1)
  assert said == [f"{tmp_path}/checkpoints/9 is a file, and no checkpoint"]


def test_a_save_that_orbax_leaves_out_has_failed(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", lambda *args, **named: False)
  said: list[str] = []
  checkpoints = checkpoint.Checkpoints(str(tmp_path), keep_latest=1, report=said.append)
  assert not checkpoints.save(1, params(1), rest(1), {})
  checkpoints.close()
  assert "saving the checkpoint of step 1 failed" in said[0]


def test_only_finite_trees_are_all_finite():
  good = {"w": jnp.ones((8, 2)), "half": jnp.ones((3,), jnp.bfloat16), "step": jnp.int32(3)}
  assert checkpoint.all_finite(good) and checkpoint.all_finite({"step": jnp.int32(3)})
  for name, value in (("w", jnp.nan), ("half", -jnp.inf)):
    assert not checkpoint.all_finite({**good, name: good[name].at[0].set(value)})
