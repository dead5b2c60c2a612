"""The interface of the writers of export formats."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Export:
  """A trained stage and the folder that a writer fills.

  Attributes:
    trained: a `training.trained.Trained` whose model computes in float32.
    folder: empty folder to write to.
    output: path that the folder will have in the end.
    parent: writes the parent with a given name, in the same format, to the subfolder of that
      name.
  """

  trained: Any
  folder: pathlib.Path
  output: str
  parent: Callable[[str], None]


def temperature_note(least: float) -> str:
  """Returns the lines of a model card on the input `temperature` of next_patch."""
  return f"""

`temperature` is a float32 scalar. Candidates are draws of the model at 1, and of its tempered head
from {least:g} to 1. Values above 1 count as 1, values below {least:g} as {least:g}."""


# Fills the folder with weights, settings and code, and returns Markdown for the model card on how
# to open it.
Writer = Callable[[Export], str]
