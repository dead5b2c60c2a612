"""Claims about the parts of a workdir: one that is swapped, edited or missing is reported."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable

import pytest
from test_checkpoint import edit_meta

from calm_jax import errors, files, seal, sealed_json, workdir, workdir_checks
from calm_jax.running import conversion, loading, train
from calm_jax.stages import autoencoder as autoencoder_stage
from calm_jax.training import ledger, meta


@pytest.fixture
def copy(trained_calm: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A copy of a finished run of stage two, for tests to change."""
  return shutil.copytree(trained_calm, tmp_path / "copy")


def content(directory: pathlib.Path) -> dict[pathlib.Path, bytes]:
  return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refused(action: Callable[[], object], reason: str) -> None:
  with pytest.raises(errors.CalmError, match=reason) as caught:
    action()
  assert "\n" not in str(caught.value)


def edit(path: pathlib.Path, change: Callable[[dict], object]) -> None:
  values = json.loads(path.read_text())
  change(values)
  path.write_text(json.dumps(values, indent=2) + "\n")


def trained_again(target: pathlib.Path, run: autoencoder_stage.Run) -> pathlib.Path:
  """Trains another run with the same data and sizes, and returns its workdir."""
  training = dataclasses.replace(run.training, steps=2, eval_every=0)
  train.train_run(dataclasses.replace(run, training=training), str(target))
  return target


SWAPS = {
  "config": (
    lambda copy: edit(copy / "config.json", lambda x: x["loss"].update(samples=2)),
    r"config.json was changed since .*put back .*; settings are changed by flags",
  ),
  "start patch": (
    lambda copy: edit(copy / "origin.json", lambda x: x["start_patch"].reverse()),
    r"origin.json was changed since the run wrote it: put back the one that was there$",
  ),
  "fingerprint": (
    lambda copy: edit(copy / "origin.json", lambda x: x.update(autoencoder_fingerprint="0")),
    r"origin.json was changed since",
  ),
  "tokenizer": (
    lambda copy: (copy / "tokenizer.model").write_bytes(b"another"),
    r"tokenizer.model has SHA-256 \w+, but the tokenizer .*: put back the one that was there",
  ),
  "seal": (
    lambda copy: edit(copy / "seal.json", lambda x: x.update(run="mine")),
    r"copy/seal.json is damaged: .*: put back",
  ),
  "no seal": (lambda copy: (copy / "seal.json").unlink(), r"seal.json is missing.*: put it back"),
  "the autoencoder's config": (
    lambda copy: edit(copy / "autoencoder/config.json", lambda x: x["model"].update(width=8)),
    r"autoencoder/config.json was changed since",
  ),
  "meta of another step": (
    lambda copy: (
      shutil.rmtree(copy / "checkpoints/6/meta"),
      shutil.copytree(copy / "checkpoints/4/meta", copy / "checkpoints/6/meta"),
    ),
    r"checkpoints/6 holds the checkpoint of step 4: put back",
  ),
}


@pytest.mark.parametrize("name", SWAPS)
def test_a_part_that_the_run_did_not_write_is_refused(name: str, copy: pathlib.Path, calm_run):
  change, reason = SWAPS[name]
  change(copy)
  before = content(copy)
  refused(lambda: loading.load(str(copy)), reason)
  refused(lambda: train.train_run(calm_run, str(copy)), reason)
  assert content(copy) == before


def test_an_autoencoder_of_another_run_is_refused(copy, autoencoder_run):
  """Replaces its checkpoints, and then the complete folder."""
  stranger = trained_again(copy.parent / "stranger", autoencoder_run)
  shutil.rmtree(copy / "autoencoder/checkpoints")
  shutil.copytree(stranger / "checkpoints", copy / "autoencoder/checkpoints")
  refused(lambda: loading.load(str(copy)), r"/2 is a checkpoint of another run: put back this")
  shutil.rmtree(copy / "autoencoder")
  shutil.copytree(stranger, copy / "autoencoder")
  refused(lambda: loading.load(str(copy)), r"autoencoder/seal.json has .*: put back the one")


def test_a_restart_leaves_tokenizer_origin_and_seal_alone(
  autoencoder_run, trained_autoencoder, tmp_path
):
  shutil.copytree(trained_autoencoder, tmp_path / "copy")
  parts = ("tokenizer.model", "origin.json", "seal.json", "config.json")
  before = {name: (tmp_path / "copy" / name).stat().st_mtime_ns for name in parts}
  train.train_run(autoencoder_run, str(tmp_path / "copy"))
  assert before == {name: (tmp_path / "copy" / name).stat().st_mtime_ns for name in parts}


def test_seals_and_origins_that_name_an_absent_autoencoder_are_read(trained_autoencoder, tmp_path):
  """Workdirs without parents were written so: their checkpoints hold `bound`."""
  directory = str(trained_autoencoder)
  origin, current = workdir.read_origin(directory), seal.read(directory)
  values = {**origin.values(), "autoencoder_fingerprint": ""}
  assert workdir.Origin.of_json(values, "origin.json") == origin
  values = json.loads(current.to_json()) | {"autoencoder": ""}
  del values[sealed_json.FIELD]
  (tmp_path / "seal.json").write_text(files.to_json(sealed_json.sealed(values)))
  read = seal.read(str(tmp_path))
  parts = [read.run, read.origin, read.tokenizer, ""]
  assert read == current and read.bound == sealed_json.digest(parts)


def test_a_workdir_of_format_1_is_refused(trained_autoencoder, tmp_path):
  shutil.copytree(trained_autoencoder, tmp_path / "copy")
  (tmp_path / "copy/seal.json").unlink()
  edit(tmp_path / "copy/origin.json", lambda values: values.pop("format_version"))
  refused(lambda: loading.load(str(tmp_path / "copy")), "of format 1, this version .* format 2")


@pytest.mark.parametrize("last", range(4))
def test_an_interrupted_change_of_config_leaves_an_intact_workdir(
  last: int, trained_autoencoder, autoencoder_run, tmp_path, monkeypatch
):
  copy = str(shutil.copytree(trained_autoencoder, tmp_path / "copy"))
  write, left = files.write, [last]

  def interrupted_write(path, text):
    if not left[0]:
      raise KeyboardInterrupt
    left[0] -= 1
    write(path, text)

  training = dataclasses.replace(autoencoder_run.training, steps=9)
  changed = dataclasses.replace(autoencoder_run, training=training)
  with monkeypatch.context() as patch:
    patch.setattr(files, "write", interrupted_write)
    try:
      workdir.change_config(copy, changed)
    except KeyboardInterrupt:
      assert last < 3
  assert loading.read_run(copy) == (changed if last > 1 else autoencoder_run)
  workdir.change_config(copy, changed)
  assert loading.read_run(copy) == changed
  assert len(seal.read(copy).config) == 1


def test_a_run_that_lost_its_checkpoints_does_not_start_again(
  autoencoder_run, trained_autoencoder, tmp_path
):
  copy = shutil.copytree(trained_autoencoder, tmp_path / "copy")
  figures = (copy / workdir.METRICS).read_bytes()
  shutil.rmtree(copy / "checkpoints")
  reason = r"was trained to step \d or further, but its checkpoints are gone: put .* back, or give"
  refused(lambda: train.train_run(autoencoder_run, str(copy)), reason)
  (copy / "checkpoints").mkdir()
  refused(lambda: train.train_run(autoencoder_run, str(copy)), reason)
  shutil.rmtree(copy / ledger.FOLDER)
  (copy / "checkpoints").rmdir()
  refused(lambda: train.train_run(autoencoder_run, str(copy)), "trained to step 6 or further")
  (copy / "checkpoints").write_text("")
  refused(lambda: train.train_run(autoencoder_run, str(copy)), "checkpoints is a file, where")
  assert (copy / workdir.METRICS).read_bytes() == figures


def test_a_run_that_lost_its_config_does_not_start_again(
  autoencoder_run, trained_autoencoder, tmp_path
):
  copy = shutil.copytree(trained_autoencoder, tmp_path / "copy")
  content = (copy / "config.json").read_bytes()
  (copy / "config.json").unlink()
  reason = "holds checkpoints, but no config.json: restore it"
  refused(lambda: train.train_run(autoencoder_run, str(copy)), reason)
  (copy / "config.json").write_bytes(content)
  assert loading.load(str(copy)).step == 6


def test_a_folder_that_the_copy_of_the_autoencoder_would_replace_is_kept(
  calm_run, trained_autoencoder, tmp_path
):
  own = shutil.copytree(trained_autoencoder, tmp_path / "runs/autoencoder")
  for source in (own, trained_autoencoder):
    run = dataclasses.replace(calm_run, autoencoder=str(source))
    refused(lambda run=run: train.train_run(run, str(tmp_path / "runs")), "a workdir of its own")
  assert loading.load(str(own)).step == 6


def test_a_data_position_that_contradicts_the_steps_is_refused(
  autoencoder_run, trained_autoencoder, tmp_path
):
  copy = shutil.copytree(trained_autoencoder, tmp_path / "copy")
  edit_meta(copy, 6, lambda values: values["data"].update(global_next_index=56), rehash=True)
  training = dataclasses.replace(autoencoder_run.training, steps=8)
  run = dataclasses.replace(autoencoder_run, training=training)
  reason = r"step 6 has data position 56, but 6 steps with batches \[\[6, 8\]\] end at 48: put back"
  refused(lambda: train.train_run(run, str(copy), train.Options(allow_config_change=True)), reason)


def test_steps_with_several_batch_sizes_add_up():
  taken = meta.Taken().after(3, 8).after(2, 8).after(4, 16).after(0, 4)
  assert taken.to_json() == [[5, 8], [4, 16]]
  data = {"global_next_index": 5 * 8 + 4 * 16, "taken": taken.to_json()}
  assert meta.Taken.of(data, 9) == taken
  for step, changed in ((8, {}), (9, {"global_next_index": 0}), (9, {"taken": [[9, 8]]})):
    refused(lambda step=step, changed=changed: meta.Taken.of({**data, **changed}, step), "put back")


def test_a_path_that_checkpoints_do_not_support_is_refused_before_anything_is_written(
  autoencoder_run, tmp_path
):
  reason = r"a path that holds one of .* is read as a pattern"
  for name in ("lr[1e-3]", "sweep?/run"):
    refused(lambda name=name: train.train_run(autoencoder_run, str(tmp_path / name)), reason)
    output = str(tmp_path / name)
    refused(lambda output=output: conversion.convert(str(tmp_path), output, "workdir"), reason)
  assert list(tmp_path.iterdir()) == []


def verdicts(directory: pathlib.Path) -> dict[str, str]:
  """Returns the result or the error of each check of a workdir, by its name."""
  results = {}
  for name, check in workdir_checks.checks(str(directory)):
    try:
      results[name] = check()
    except errors.CalmError as error:
      results[name] = f"error: {error}"
  return results


def test_every_part_of_an_intact_workdir_passes_its_check(trained_calm):
  results = verdicts(trained_calm)
  own = {"seal.json", "config.json", "origin.json", "tokenizer.model"}
  figures = {"metrics.jsonl", "ledger", "checkpoints/4", "checkpoints/6", "checkpoints/2"}
  inner = {f"autoencoder/{name}" for name in own} | {"autoencoder/checkpoints/6", "autoencoder"}
  assert set(results) >= own | figures | inner
  assert not [name for name, verdict in results.items() if verdict.startswith("error")]
  assert results["checkpoints/6"] == "intact: params, rest, meta"


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_detected(copy):
  """A flip may be harmless, if the checkpoint reads back as before, but not in a data file."""
  place, detected, harmless = copy / "checkpoints/6", 0, []
  (copy / "checkpoints/4").rename(copy / "four")
  for path in sorted(path for path in place.rglob("*") if path.is_file() and path.stat().st_size):
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes(flipped)
    try:
      dict(workdir_checks.checks(str(copy)))["checkpoints/6"]()
      harmless.append(path.relative_to(place))
    except errors.CalmError:
      detected += 1
    path.write_bytes(content)
  assert detected >= 3 and not [path for path in harmless if path.parts[1:2] == ("d",)], harmless


def test_each_damaged_part_is_reported_by_its_own_check(copy):
  shutil.copytree(copy / "autoencoder/checkpoints/6", copy / "checkpoints/8")
  assert "checkpoints/8 is a checkpoint of another run" in verdicts(copy)["checkpoints/8"]
  (copy / "tokenizer.model").write_bytes(b"")
  assert "put back the one that was there" in verdicts(copy)["tokenizer.model"]
  (copy / "config.json").unlink()
  refused(lambda: verdicts(copy), "no workdir at")
