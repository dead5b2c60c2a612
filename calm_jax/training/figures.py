"""What a figure is called, measured in and compared with: for consoles, reports and documents."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

HIGHER, LOWER = "higher is better", "lower is better"


@dataclasses.dataclass(frozen=True)
class Figure:
  """A figure of training or of evaluation; `name`_stderr is its standard error if there is one.

  Attributes:
    name: under which it is stored. label: for people.
    direction: which way is better, or what the figure is compared with.
    scale: factor from the stored figure to one in `unit`.
    console: what of it the line of a report shows.
  """

  name: str
  label: str
  unit: str
  direction: str
  scale: float = 1.0
  console: Literal["", "value", "value and error"] = ""


def on_console(figures: Iterable[Figure]) -> list[str]:
  """Returns the names under which a report's line finds what it shows."""
  names = []
  for figure in figures:
    names += [figure.name] * bool(figure.console)
    names += [f"{figure.name}_stderr"] * (figure.console == "value and error")
  return names
