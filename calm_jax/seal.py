"""Parts of a workdir -> one hash that binds them; every reader checks it.

seal.json holds the SHA-256 of config.json, origin.json, the tokenizer's copy and the
autoencoder's own seal.json. `bound` is one hash over those that never change and over
a number of the run's own: every checkpoint holds it, so that one of another run is
refused. A seal finds damage, mistakes and swapped parts, not malice.
"""

import dataclasses
import hashlib
import uuid
from typing import Any

from etils import epath

from calm_jax import distributed, errors, files, sealed_json

FILE = "seal.json"
# Of a workdir; 1 had no seal.
FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Seal:
  """The hashes of a workdir's parts.

  Attributes:
    run: tells apart two runs on the same data. origin, tokenizer, autoencoder: SHA-256
      of origin.json, the tokenizer's copy and the autoencoder's seal.json, else empty.
    config: of config.json; of the one before as well while it is being replaced.
  """

  run: str
  origin: str
  tokenizer: str
  autoencoder: str
  config: tuple[str, ...]

  @property
  def bound(self) -> str:
    """One hash over all that never changes."""
    return sealed_json.digest([self.run, self.origin, self.tokenizer, self.autoencoder])

  def to_json(self) -> str:
    values = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
    values["config"] = list(self.config)
    return files.to_json(sealed_json.sealed(values))


def of_bytes(content: bytes) -> str:
  """Returns the SHA-256 of bytes, as hexadecimal digits."""
  return hashlib.sha256(content).hexdigest()


def make(directory: str, config: str, origin: str, tokenizer: epath.PathLike) -> Seal:
  """Returns the seal of a new workdir, the same on all processes; its autoencoder lies there.

  Args:
    config, origin: what its config.json and origin.json will hold.
    tokenizer: the file that will be copied.

  Raises:
    CalmError: if a file can't be read.
  """
  inner = epath.Path(directory) / "autoencoder" / FILE
  return Seal(
    run=distributed.from_first("run", uuid.uuid4().hex),
    origin=of_bytes(origin.encode()),
    tokenizer=files.digest(tokenizer),
    autoencoder=files.digest(inner) if inner.exists() else "",
    config=(of_bytes(config.encode()),),
  )


def write(directory: str, seal: Seal) -> None:
  """Writes a workdir's seal.

  Raises:
    CalmError: if it can't be written.
  """
  files.write(epath.Path(directory) / FILE, seal.to_json())


def read(directory: str) -> Seal:
  """Returns the seal of a workdir.

  Raises:
    CalmError: if there is none, it is of another format or was changed.
  """
  path = epath.Path(directory) / FILE
  if not path.exists():
    _require_format(directory, _format_of_origin(directory))
    raise errors.CalmError(f"{path} is missing, which binds the workdir's parts: put it back")
  values = files.read_json(path)
  _require_format(directory, values.get("format_version"))
  try:
    values = sealed_json.unsealed(values, str(path))
  except errors.CalmError as error:
    raise errors.CalmError(f"{error}: put back the one of the run") from error
  del values["format_version"]
  return Seal(**{**values, "config": tuple(values["config"])})


def _format_of_origin(directory: str) -> Any:
  path = epath.Path(directory) / "origin.json"
  return files.read_json(path).get("format_version", 1) if path.exists() else FORMAT_VERSION


def _require_format(directory: str, version: Any) -> None:
  if version != FORMAT_VERSION:
    raise errors.CalmError(
      f"{directory} is a workdir of format {version}, this version of calm_jax reads format "
      f"{FORMAT_VERSION}: read it with the version that wrote it, or train in a new --workdir"
    )


def read_part(directory: str, name: str) -> bytes:
  """Returns what config.json or origin.json holds.

  Raises:
    CalmError: if it can't be read or is not what the seal was made over.
  """
  path, is_config = epath.Path(directory) / name, name == "config.json"
  for _ in range(2):  # Both may have been replaced between the two reads.
    content, seal = files.read(path), read(directory)
    if of_bytes(content) in (seal.config if is_config else (seal.origin,)):
      return content
  advice = "; settings are changed by flags and --allow_config_change" if is_config else ""
  raise errors.CalmError(
    f"{path} was changed since the run wrote it: put back the one that was there{advice}"
  )


def require_tokenizer(directory: str, name: str) -> None:
  """Raises CalmError unless a workdir's tokenizer is the one that the run began with."""
  path = epath.Path(directory) / name
  _require_digest(path, read(directory).tokenizer, "the tokenizer")


def require_autoencoder(directory: str) -> None:
  """Raises CalmError unless a workdir's autoencoder, if it has one, is the run's own."""
  expected = read(directory).autoencoder
  if expected:
    _require_digest(epath.Path(directory) / "autoencoder" / FILE, expected, "the autoencoder")


def _require_digest(path: epath.Path, expected: str, what: str) -> None:
  found = files.digest(path)
  if found != expected:
    raise errors.CalmError(
      f"{path} has SHA-256 {found[:16]}, but {what} that this run was trained with has "
      f"{expected[:16]}: put back the one that was there"
    )
