"""Names, units and directions of figures, for consoles, reports and documents."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

HIGHER, LOWER = "higher is better", "lower is better"


@dataclasses.dataclass(frozen=True)
class Figure:
  """A figure of training or of evaluation; its standard error, if any, is stored as NAME_stderr.

  Attributes:
    name: name under which it is stored.
    label: name that is shown.
    unit: unit of the shown value.
    direction: whether higher or lower is better, or what to compare the figure with.
    scale: factor from the stored value to one in `unit`.
    console: whether console lines show the value, and its standard error.
  """

  name: str
  label: str
  unit: str
  direction: str
  scale: float = 1.0
  console: Literal["", "value", "value and error"] = ""


def on_console(figures: Iterable[Figure]) -> list[str]:
  """Returns the stored names of the values that console lines show."""
  names = []
  for figure in figures:
    names += [figure.name] * bool(figure.console)
    names += [f"{figure.name}_stderr"] * (figure.console == "value and error")
  return names
