"""Claims about SHA256SUMS: every change of an exported folder is detected."""

import pathlib
import random
import shutil
import subprocess
from collections.abc import Callable

import pytest
from folders import all_params, assert_same, converted

from calm_jax import errors
from calm_jax.interchange import checking, checksums, tensors
from calm_jax.running import conversion
from calm_jax.stages import table


@pytest.fixture(scope="module")
def exported(trained_calm, tmp_path_factory) -> pathlib.Path:
  """An exported language model in shards."""
  target = tmp_path_factory.mktemp("exported") / "out"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tensors, "SHARD_BYTES", 20_000)
    conversion.convert(str(trained_calm), str(target), "reference")
  return target


@pytest.fixture
def copy(exported, tmp_path) -> pathlib.Path:
  shutil.copytree(exported, tmp_path / "copy")
  return tmp_path / "copy"


@pytest.mark.parametrize("kind", ["torch", "stablehlo", "reference"])
def test_sha256sum_accepts_every_file_of_every_format(kind, trained_autoencoder, tmp_path):
  conversion.convert(str(trained_autoencoder), str(tmp_path / "out"), kind)
  command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
  done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, check=True)
  intact = {line.removesuffix(": OK") for line in done.stdout.splitlines()}
  assert intact == {path.name for path in (tmp_path / "out").iterdir()} - {"SHA256SUMS"}


def test_subfolders_and_shards_have_sums_too(exported):
  names = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
  assert checksums.read(exported).keys() == names - {"SHA256SUMS"}
  assert "autoencoder/SHA256SUMS" in names and any(name.startswith("model-00002") for name in names)
  inside = len(list((exported / "autoencoder").iterdir()))
  assert checksums.check(exported / "autoencoder") == inside - 1


def test_each_changed_or_missing_file_is_named(exported, tmp_path):
  for name in checksums.read(exported):
    shutil.copytree(exported, tmp_path / "copy")
    path = tmp_path / "copy" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    reason = f"{name} is not the file that was written"
    with pytest.raises(errors.CalmError, match=reason) as caught:
      converted(tmp_path / "copy")
    path.unlink()
    with pytest.raises(
      errors.CalmError, match=f"{name} is missing: SHA|not a folder with a config"
    ):
      converted(tmp_path / "copy")
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("copy_*"))
    shutil.rmtree(tmp_path / "copy")


def test_a_used_file_needs_a_sum_and_notes_do_not(copy):
  (copy / "NOTES.txt").write_text("mine")
  assert converted(copy)
  shutil.rmtree(f"{copy}_workdir")
  for name in ("model.safetensors", "tokenizer.json", "model.safetensors.index.json.bin"):
    (copy / name).write_bytes(b"new")
    with pytest.raises(errors.CalmError, match=f"{name} has no line in SHA256SUMS"):
      converted(copy)
    (copy / name).unlink()


def test_a_folder_without_sums_is_read_unchecked(copy):
  (copy / "config.json").write_text((copy / "config.json").read_text() + " \n")
  (copy / "SHA256SUMS").unlink()
  assert converted(copy)


SUM = "0" * 64
BAD = {
  "outside": (f"{SUM}  ../x\n", r"line 1: names a file outside its folder: '\.\./x'"),
  "from the root": (f"{SUM}  /etc/passwd\n", "line 1: names a file outside its folder"),
  "no sum": ("what\n", "line 1: not a line of sha256sum; fetch"),
  "empty": ("", "SHA256SUMS names no file; fetch or convert"),
  "no text": (b"\xff\xfe", "SHA256SUMS is not text"),
}


@pytest.mark.parametrize(("content", "reason"), BAD.values(), ids=BAD.keys())
def test_invalid_sums_are_reported_in_one_line(content, reason, copy):
  (copy / "SHA256SUMS").write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(errors.CalmError, match=reason) as caught:
    converted(copy)
  assert "\n" not in str(caught.value)


def damaged(seed: int, content: bytes) -> bytes:
  """Returns the content with a flipped bit, a cut, zeros, an insertion, or nothing left."""
  draw = random.Random(seed)
  place = draw.randrange(len(content))
  changed = bytearray(content)
  changed[place] ^= 1 << draw.randrange(8)
  return draw.choice(
    [
      bytes(changed),
      content[:place],
      content[:place] + bytes(len(content) - place),
      content[:place] + draw.randbytes(7) + content[place:],
      b"",
    ]
  )


def test_random_damage_is_detected_or_harmless(exported, tmp_path):
  names = sorted(str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file())
  shutil.copytree(exported, tmp_path / "copy")
  expected = all_params(converted(exported))
  shutil.rmtree(f"{exported}_workdir")
  detected = 0
  for seed in range(60):
    path = tmp_path / "copy" / names[seed % len(names)]
    intact = path.read_bytes()
    path.write_bytes(damaged(seed, intact))
    try:
      assert_same(all_params(converted(tmp_path / "copy")), expected)
      shutil.rmtree(tmp_path / "copy_workdir")
    except errors.CalmError as error:
      detected += 1
      assert "\n" not in str(error)
    path.write_bytes(intact)
  assert detected > 50


# The checks of `calm_jax.verify`.


@pytest.mark.parametrize(
  ("kind", "stage"),
  [
    (kind, stage) for stage, spec in table.STAGES.items() for kind in spec.writers if kind != "onnx"
  ],
)
def test_every_check_passes_on_what_we_write(kind, stage, request, tmp_path):
  source = request.getfixturevalue(f"trained_{stage}")
  conversion.convert(str(source), str(tmp_path / "out"), kind)
  assert checking.is_exported(tmp_path / "out") and not checking.is_exported(source)
  lines = {name: check(tmp_path / "out") for name, check in checking.CHECKS.items()}
  assert lines["index"] == "no shards" and lines["checksums"] != "not checked"


def without_a_sum(folder: pathlib.Path) -> None:
  lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
  (folder / "SHA256SUMS").write_text("".join(x for x in lines if not x.endswith("config.json\n")))


def cut(folder: pathlib.Path) -> None:
  path = sorted((folder / "autoencoder").glob("*.safetensors"))[0]
  path.write_bytes(path.read_bytes()[:-1])


def without_a_shard(folder: pathlib.Path) -> None:
  sorted(folder.glob("*.safetensors"))[0].unlink()


def other_config(folder: pathlib.Path) -> None:
  shutil.copyfile(folder / "autoencoder/config.json", folder / "config.json")


FAULTS: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
  "checksums": (without_a_sum, "config.json has no line in SHA256SUMS"),
  "headers": (cut, "can't read .*autoencoder/model-00001"),
  "index": (without_a_shard, "names 'model-00001-of-.*', which does not exist"),
  "shapes": (other_config, "copy/config.json: num_attention_heads must be a number"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_check_finds_its_fault(name, copy):
  change, reason = FAULTS[name]
  change(copy)
  with pytest.raises(errors.CalmError, match=reason):
    checking.CHECKS[name](copy)


def test_programs_are_compared_with_the_weights(trained_autoencoder, tmp_path):
  conversion.convert(str(trained_autoencoder), str(tmp_path / "out"), "stablehlo")
  assert checking.shapes(tmp_path / "out") == "2 programs"
  path = tmp_path / "out/decode.stablehlo"
  intact = path.read_bytes()
  path.write_bytes(intact[:100])
  with pytest.raises(errors.CalmError, match=r"decode.stablehlo is not an artefact of jax.export"):
    checking.shapes(tmp_path / "out")
  path.write_bytes(intact)
  tensors.write_folder(tmp_path / "out", [])
  with pytest.raises(errors.CalmError, match=r"takes decoder/expand/bias of shape .* has None"):
    checking.shapes(tmp_path / "out")
