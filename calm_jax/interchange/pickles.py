"""PyTorch's pickled weights -> tensors by name, without executing code in the pickle."""

import pathlib
import zipfile
from typing import Any

from calm_jax import errors, files

_BLOCK_BYTES = 2**20


def load(path: pathlib.Path) -> dict[str, Any]:
  """Returns the torch tensors in a `.bin` file by name, memory-mapped if the format allows it.

  Raises:
    CalmError: if torch is missing, or the file is damaged or holds compressed members, code, or
      anything but plain tensors by name.
  """
  try:
    import torch
  except ImportError as error:
    raise errors.CalmError(
      f"{path} is a PyTorch file, which needs torch to read: pip install torch"
    ) from error
  files.require_regular(path)
  try:
    with path.open("rb") as file:
      is_zip = file.read(2) == b"PK"  # PyTorch's format since 1.6; older ones can't be mapped.
    if is_zip:
      _require_valid(path)
    values = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
  except errors.CalmError:
    raise
  except Exception as error:  # The pickle holds more than tensors, or the file is damaged.
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    raise errors.CalmError(
      f"can't read {path} as plain weights; it is damaged, or holds code, which is not executed: "
      f"{reason}"
    ) from error
  if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
    raise errors.CalmError(f"{path} holds no tensors by name, but a {type(values).__name__}")
  for name, value in values.items():
    if not isinstance(value, torch.Tensor):
      raise errors.CalmError(
        f"{path} holds {name!r}, which is not a tensor: {type(value).__name__}"
      )
    _require_plain(path, name, value)
  return values


def _require_valid(path: pathlib.Path) -> None:
  """Raises CalmError unless each member is uncompressed and matches its CRC.

  PyTorch maps members without these checks, and would read compressed bytes as weights.
  """
  names = set()
  with zipfile.ZipFile(path) as archive:
    for member in archive.infolist():
      if member.compress_type != zipfile.ZIP_STORED:
        raise errors.CalmError(
          f"{path} holds {member.filename!r} compressed, which PyTorch misreads when it maps a "
          "file: unpack it and pack it again uncompressed (zip -0), or save it with torch.save"
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
          "if torch.serialization.set_crc32_options turned them off)"
        ) from error


def _require_plain(path: pathlib.Path, name: str, value: Any) -> None:
  """Raises CalmError unless the file holds all values of a tensor."""
  import torch

  if value.layout != torch.strided or value.is_meta or value.is_quantized:
    raise errors.CalmError(f"{path} holds {name!r}, which is not a plain tensor: save it dense")
  needed, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
  if needed > stored:  # With strides of 0, a small file could claim any size.
    raise errors.CalmError(
      f"{path} holds {stored} bytes for {name!r}, whose shape {list(value.shape)} needs {needed}: "
      "save it contiguous"
    )
