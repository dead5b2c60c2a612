"""SHA256SUMS: the checksums of the files of an exported folder, in the format of sha256sum(1)."""

import fnmatch
import pathlib
import re
from collections.abc import Iterable

from calm_jax import errors, files

NAME = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write(folder: pathlib.Path) -> None:
  """Writes the sums of all files below a folder, and flushes all of them to disk.

  Raises:
    CalmError: if a file can't be read or the sums can't be written.
  """
  paths = sorted(path for path in folder.rglob("*") if path != folder / NAME)
  lines = []
  for path in paths:
    files.sync(path)
    if path.is_file():
      lines.append(f"{files.digest(path)}  {path.relative_to(folder).as_posix()}\n")
  files.write(folder / NAME, "".join(lines))


def read(folder: pathlib.Path) -> dict[str, str]:
  """Returns file name -> sum of a folder, {} if it has no sums.

  Raises:
    CalmError: if the sums can't be read, or name a file outside the folder.
  """
  path = folder / NAME
  if not path.exists():
    return {}
  try:
    lines = files.read(path).decode().splitlines()
  except UnicodeDecodeError as error:
    raise errors.CalmError(f"{path} is not text: {error}; {_ADVICE}") from error
  sums = {}
  for number, line in enumerate(lines, start=1):
    match = _LINE.fullmatch(line)
    if not match:
      raise errors.CalmError(f"{path}, line {number}: not a line of sha256sum; {_ADVICE}")
    name = match[2]
    if name.startswith("/") or ".." in pathlib.PurePosixPath(name).parts or not name.isprintable():
      raise errors.CalmError(f"{path}, line {number}: names a file outside its folder: {name!r}")
    sums[name] = match[1]
  if not sums:
    raise errors.CalmError(f"{path} names no file; {_ADVICE}")
  return sums


def check(folder: pathlib.Path, used: Iterable[str] = ()) -> int:
  """Checks the files of a folder against its sums; returns their number, 0 without sums.

  Args:
    folder: the folder.
    used: patterns of file names; matching files in the folder must have a sum. Other files
      without a sum, such as notes or those of git, are ignored.

  Raises:
    CalmError: at the first file that is missing, changed, or used without a sum.
  """
  sums = read(folder)
  if not sums:
    return 0
  for name, expected in sums.items():
    path = folder / name
    if not path.exists():
      raise errors.CalmError(f"{path} is missing: {NAME} names it; {_ADVICE}")
    actual = files.digest(path)
    if actual != expected:
      raise errors.CalmError(
        f"{path} is not the file that was written: its SHA-256 begins with {actual[:8]}, in {NAME} "
        f"with {expected[:8]}; {_ADVICE}"
      )
  for path in sorted(folder.iterdir()):
    if path.name not in sums and any(fnmatch.fnmatchcase(path.name, p) for p in used):
      raise errors.CalmError(f"{path} has no line in {NAME}: remove it; {_OWN_CHANGE}")
  return len(sums)


_OWN_CHANGE = f"if you made the change, delete {NAME} or rewrite it with sha256sum"
_ADVICE = f"fetch or convert the folder again; {_OWN_CHANGE}"
