"""What a format's writer is given, and what it returns."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Export:
  """A trained stage and the folder that a writer fills.

  Attributes:
    trained: a `training.trained.Trained` whose model computes in float32.
    folder: where to write, empty so far. output: where that folder will be in the end.
    parent: writes the parent of a name, in the same format, into the folder's subfolder of
      that name.
  """

  trained: Any
  folder: pathlib.Path
  output: str
  parent: Callable[[str], None]


# Fills the folder with weights, settings and code; returns Markdown on how it is opened, for the
# model card.
Writer = Callable[[Export], str]
