"""Claims about PyTorch's .bin files: files that torch would misread are refused."""

import pathlib
import zipfile

import numpy as np
import pytest
from folders import converted, weights

from calm_jax import errors
from calm_jax.interchange import pickles

torch = pytest.importorskip("torch", reason="a .bin file needs torch to write and to read")


@pytest.fixture
def pickled(folder: pathlib.Path) -> pathlib.Path:
  """The k4 energy model's weights as a .bin file."""
  path = folder / "pytorch_model.bin"
  torch.save({name: torch.from_numpy(x) for name, x in weights(folder).items()}, path)
  (folder / "model.safetensors").unlink()
  return path


def repack(path: pathlib.Path, method: int) -> None:
  """Packs a zip file again, as an archiver does."""
  with zipfile.ZipFile(path) as archive:
    members = [(name, archive.read(name)) for name in archive.namelist()]
  with zipfile.ZipFile(path, "w", method) as archive:
    for name, content in members:
      archive.writestr(name, content)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members_are_refused(method: int, pickled):
  repack(pickled, method)
  with pytest.raises(errors.CalmError, match=r"holds '.*' compressed, .* save it with torch.save"):
    converted(pickled.parent)


def test_a_file_that_was_repacked_uncompressed_is_read(pickled):
  repack(pickled, zipfile.ZIP_STORED)
  expected = torch.load(pickled)["embed_proj.0.weight"].T
  kernel = converted(pickled.parent).params["backbone"]["input"]["up"]["kernel"]
  np.testing.assert_array_equal(kernel, expected)


def test_a_zip_bomb_is_refused_unread(pickled):
  with zipfile.ZipFile(pickled, "a", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("archive/data/bomb", bytes(2**24))
  with pytest.raises(errors.CalmError, match="holds 'archive/data/bomb' compressed"):
    converted(pickled.parent)


def test_each_flipped_bit_of_a_weight_is_detected(pickled):
  content = bytearray(pickled.read_bytes())
  with zipfile.ZipFile(pickled) as archive:
    member = next(m for m in archive.infolist() if m.file_size == 64 * 128 * 4)
  values = content.index(archive_content(pickled, member.filename))
  for place in (0, 1000, member.file_size - 1):
    damaged = content.copy()
    damaged[values + place] ^= 4
    pickled.write_bytes(damaged)
    with pytest.raises(errors.CalmError, match=rf"damaged at '{member.filename}': Bad CRC-32"):
      converted(pickled.parent)


def archive_content(path: pathlib.Path, name: str) -> bytes:
  with zipfile.ZipFile(path) as archive:
    return archive.read(name)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_duplicate_member_is_refused(pickled):
  with zipfile.ZipFile(pickled, "a") as archive:
    archive.writestr(archive.namelist()[0], b"other")
  with pytest.raises(errors.CalmError, match=r"data.pkl' twice: it is damaged"):
    converted(pickled.parent)


@pytest.mark.parametrize(
  ("value", "reason"),
  [
    (torch.ones(1).expand(10**9, 10**6), r"holds 4 bytes for 'x', .* needs 4000000000000000"),
    (torch.eye(3).to_sparse(), "holds 'x', which is not a plain tensor"),
    (torch.ones(3, device="meta"), "holds 'x', which is not a plain tensor"),
  ],
  ids=["strides of 0", "sparse", "without values"],
)
@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_a_tensor_whose_values_are_not_all_in_the_file_is_refused(
  value, reason, new: bool, tmp_path
):
  """A small file may claim any size."""
  torch.save({"x": value}, tmp_path / "x.bin", _use_new_zipfile_serialization=new)
  with pytest.raises(errors.CalmError, match=reason):
    pickles.load(tmp_path / "x.bin")


def test_tied_tensors_are_read(tmp_path):
  table = torch.arange(6.0).reshape(2, 3)
  torch.save({"a": table, "b": table, "c": table.T}, tmp_path / "x.bin")
  loaded = pickles.load(tmp_path / "x.bin")
  np.testing.assert_array_equal(loaded["b"], table)
  np.testing.assert_array_equal(loaded["c"], table.T)
