"""Measurements -> documents: figures are copied by this code, never by hand.

In a Markdown file, the fenced block after a line `<!-- benchmarks/NAME.json -->` shows the
lines of that file.
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
    command: the command line.
    environment: environment variables that affect speed, if set.
    lines: the figures as text.
    figures: the figures for programs, in more detail.
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
    """Returns the block that a document shows."""
    variables = "".join(f"{name}={value} " for name, value in sorted(self.environment.items()))
    conditions = f"at commit {self.commit}, jax {self.versions['jax']}, {self.processor}"
    return "\n".join([f"$ {variables}{self.command}", f"  {conditions}", *self.lines])


def read(path: pathlib.Path) -> Record:
  """Returns the record that `benchmark --output` wrote.

  Raises:
    CalmError: if the file can't be read or holds no record.
  """
  try:
    record = Record(**files.read_json(path))
    if not isinstance(record.lines, list):
      raise TypeError("lines is not a list")
    record.text()
  except (LookupError, TypeError, ValueError, AttributeError) as error:
    raise errors.CalmError(f"{path} holds no run of a benchmark: {error}") from error
  return record


def updated(text: str, folder: pathlib.Path) -> str:
  """Returns a document with its blocks replaced from the files below `folder`."""

  def block(match: re.Match[str]) -> str:
    return f"{match.group(1)}```\n{read(folder / match.group(2)).text()}\n```\n"

  return _BLOCK.sub(block, text)


def update(path: str) -> None:
  """Replaces the blocks of a document.

  Raises:
    CalmError: if the document, or a file that it names, can't be read.
  """
  content = files.read(path)
  try:
    text = content.decode()
  except UnicodeDecodeError as error:
    raise errors.CalmError(f"--document={path} is not UTF-8: {error}") from error
  files.write(path, updated(text, pathlib.Path(path).parent))
