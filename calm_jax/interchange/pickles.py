"""PyTorch's pickled weights -> tensors by name, with nothing in them run."""

import pathlib
import zipfile
from typing import Any

from calm_jax import errors, files

_BLOCK_BYTES = 2**20


def load(path: pathlib.Path) -> dict[str, Any]:
  """Returns the torch tensors in a `.bin` file by name, mapped where the format lets them be.

  Raises:
    CalmError: if torch is missing, the file is damaged, holds compressed members or
      what would have to be run, or anything but plain tensors by name.
  """
  try:
    import torch
  except ImportError as error:
    raise errors.CalmError(
      f"{path} is a PyTorch file, which takes torch to read: pip install torch"
    ) from error
  files.require_regular(path)
  try:
    with path.open("rb") as file:
      is_zip = file.read(2) == b"PK"  # PyTorch's format since 1.6; the one before can't be mapped.
    if is_zip:
      _require_sound(path)
    values = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
  except errors.CalmError:
    raise
  except Exception as error:  # A pickle that holds anything but tensors, or a damaged file.
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    raise errors.CalmError(
      f"can't read {path} as plain weights; it is damaged, or holds what would have to be run, "
      f"which is not done: {reason}"
    ) from error
  if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
    raise errors.CalmError(f"{path} holds no tensors by name, but a {type(values).__name__}")
  for name, value in values.items():
    if not isinstance(value, torch.Tensor):
      raise errors.CalmError(f"{path} holds {name!r}, which is no tensor: {type(value).__name__}")
    _require_plain(path, name, value)
  return values


def _require_sound(path: pathlib.Path) -> None:
  """Raises CalmError unless each member is stored as it is and has the CRC it was written with.

  PyTorch maps members without looking: compressed ones it would take for weights.
  """
  names = set()
  with zipfile.ZipFile(path) as archive:
    for member in archive.infolist():
      if member.compress_type != zipfile.ZIP_STORED:
        raise errors.CalmError(
          f"{path} holds {member.filename!r} compressed, which PyTorch reads wrong where it maps "
          "a file: unpack it and pack it again uncompressed (zip -0), or save it with torch.save"
        )
      if member.filename in names:
        raise errors.CalmError(f"{path} holds {member.filename!r} twice: it is damaged")
      names.add(member.filename)
      try:
        with archive.open(member) as content:
          while content.read(_BLOCK_BYTES):
            pass
      except zipfile.BadZipFile as error:
        raise errors.CalmError(
          f"{path} is damaged at {member.filename!r}: {error}; fetch or save it again (with CRCs, "
          "where torch.serialization.set_crc32_options turned them off)"
        ) from error


def _require_plain(path: pathlib.Path, name: str, value: Any) -> None:
  """Raises CalmError unless a tensor's values all lie in the file."""
  import torch

  if value.layout != torch.strided or value.is_meta or value.is_quantized:
    raise errors.CalmError(f"{path} holds {name!r}, which is no plain tensor: save it dense")
  needed, there = value.numel() * value.element_size(), value.untyped_storage().nbytes()
  if needed > there:  # Of strides of 0: a small file could claim any size.
    raise errors.CalmError(
      f"{path} holds {there} bytes for {name!r}, whose shape {list(value.shape)} takes {needed}: "
      "save it contiguous"
    )
