"""Measurements -> documents: figures are copied by this code, never by hand.

Where a Markdown file has a line `<!-- benchmarks/NAME.json -->`, the fenced block after
it is that file's.
"""

import dataclasses
import pathlib
import re
from typing import Any

from calm_jax import errors, files

_BLOCK = re.compile(r"(<!-- (\S+\.json) -->\n)(?:```\n.*?```\n)?", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Record:
  """One run of a suite.

  Attributes:
    command: that was given. environment: what of it speeds depend on.
    lines: for people. figures: the same and more, for programs.
  """

  command: str
  suite: str
  commit: str | None
  versions: dict[str, str | None]
  environment: dict[str, str]
  processor: str
  lines: list[str]
  figures: Any

  def text(self) -> str:
    """Returns what a document shows."""
    before = "".join(f"{name}={value} " for name, value in sorted(self.environment.items()))
    told = f"at commit {self.commit}, jax {self.versions['jax']}, {self.processor}"
    return "\n".join([f"$ {before}{self.command}", f"  {told}", *self.lines])


def read(path: pathlib.Path) -> Record:
  """Returns a run that `benchmark --output` wrote.

  Raises:
    CalmError: if there is none.
  """
  try:
    record = Record(**files.read_json(path))
    if not isinstance(record.lines, list):
      raise TypeError("lines is no list")
    record.text()
  except (LookupError, TypeError, ValueError, AttributeError) as error:
    raise errors.CalmError(f"{path} holds no run of a benchmark: {error}") from error
  return record


def updated(text: str, folder: pathlib.Path) -> str:
  """Returns a document with its blocks made anew from the files beside it."""

  def block(match: re.Match[str]) -> str:
    return f"{match.group(1)}```\n{read(folder / match.group(2)).text()}\n```\n"

  return _BLOCK.sub(block, text)


def update(path: str) -> None:
  """Writes the blocks of a document anew.

  Raises:
    CalmError: if it, or a file that it names, can't be read.
  """
  content = files.read(path)
  try:
    text = content.decode()
  except UnicodeDecodeError as error:
    raise errors.CalmError(f"--document={path} is not UTF-8: {error}") from error
  files.write(path, updated(text, pathlib.Path(path).parent))
