"""Parts of a workdir -> one hash that binds them together; every reader checks it.

seal.json holds the SHA-256 of config.json, origin.json, the tokenizer's copy and each parent's
own seal.json. `bound` is one hash over the parts that never change and over a random id of the
run. Every checkpoint holds it, so a checkpoint of another run is refused. A seal detects damage,
mistakes and swapped parts, but not malice.
"""

import dataclasses
import hashlib
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from calm_jax import distributed, errors, files, sealed_json

FILE = "seal.json"
# Format of a workdir; format 1 had no seal.
FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Seal:
  """The hashes of a workdir's parts.

  Attributes:
    run: random id of the run, because two runs may have the same parts.
    origin: SHA-256 of origin.json.
    tokenizer: SHA-256 of the tokenizer's copy.
    config: SHA-256 of config.json; while it is being replaced, of the old and the new one.
    parents: SHA-256 of each parent's seal.json, by the parent's name, which is its key in the file.
  """

  run: str
  origin: str
  tokenizer: str
  config: tuple[str, ...]
  parents: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def bound(self) -> str:
    """One hash over the parts that never change."""
    parents = [self.parents[name] for name in sorted(self.parents)] or [""]
    return sealed_json.digest([self.run, self.origin, self.tokenizer, *parents])

  def to_json(self) -> str:
    values = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
    values |= {"config": list(self.config), **values.pop("parents")}
    return files.to_json(sealed_json.sealed(values))


def of_bytes(content: bytes) -> str:
  """Returns the SHA-256 of bytes, as hexadecimal digits."""
  return hashlib.sha256(content).hexdigest()


def make(
  directory: str, config: str, origin: str, tokenizer: epath.PathLike, parents: Iterable[str]
) -> Seal:
  """Returns the seal of a new workdir, the same on all processes.

  Args:
    directory: the workdir, which holds copies of its parents already.
    config, origin: content of the future config.json and origin.json.
    tokenizer: the tokenizer file that will be copied.
    parents: names of the parents.

  Raises:
    CalmError: if a file can't be read.
  """
  return Seal(
    run=distributed.from_first("run", uuid.uuid4().hex),
    origin=of_bytes(origin.encode()),
    tokenizer=files.digest(tokenizer),
    config=(of_bytes(config.encode()),),
    parents={name: files.digest(epath.Path(directory) / name / FILE) for name in parents},
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
    CalmError: if there is none, it has another format or was changed.
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
  own = {name: values.pop(name) for name in ("run", "origin", "tokenizer")}
  config = tuple(values.pop("config"))
  del values["format_version"]
  parents = {name: digest for name, digest in values.items() if digest}
  return Seal(**own, config=config, parents=parents)


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
  """Returns the content of config.json or origin.json.

  Raises:
    CalmError: if it can't be read or differs from what the seal covers.
  """
  path, is_config = epath.Path(directory) / name, name == "config.json"
  for _ in range(2):  # Twice, since the file and the seal may be replaced between the two reads.
    content, seal = files.read(path), read(directory)
    if of_bytes(content) in (seal.config if is_config else (seal.origin,)):
      return content
  advice = "; settings are changed by flags and --allow_config_change" if is_config else ""
  raise errors.CalmError(
    f"{path} was changed since the run wrote it: put back the one that was there{advice}"
  )


def require_tokenizer(directory: str, name: str) -> None:
  """Raises CalmError unless a workdir's tokenizer is the one that the run started with."""
  path = epath.Path(directory) / name
  _require_digest(path, read(directory).tokenizer, "tokenizer")


def require_parents(directory: str) -> None:
  """Raises CalmError if a parent in a workdir is not the one that the run was trained with."""
  for name, expected in read(directory).parents.items():
    _require_digest(epath.Path(directory) / name / FILE, expected, name)


def _require_digest(path: epath.Path, expected: str, part: str) -> None:
  claim = f"the {part} that this run was trained with has"
  files.require_digest(path, expected, claim, "put back the one that was there")
