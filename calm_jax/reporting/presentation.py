"""The description of a stage that reports and model cards show."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from calm_jax import figures


@dataclasses.dataclass(frozen=True)
class Presentation:
  """How reports and model cards show a stage.

  Attributes:
    heading: heading of its section in a report.
    title: title of its model card.
    settings: dotted names of the settings that shape it, in display order.
    metrics: settings -> figures that its loss reports, in display order.
    figures: figures that its evaluation reports, in display order.
    loss_unit: settings -> unit of the training loss.
    pictures: returns its `drawing.Picture`s; a function, so that matplotlib is imported only for
      drawing.
    brief: settings -> its sizes in a few words.
    facts: (settings, parents' settings) -> further rows of its model card.
    summary: name in summary.json -> figure of its evaluation.
  """

  heading: str
  title: str
  settings: tuple[str, ...]
  metrics: Callable[[Any], tuple[figures.Figure, ...]]
  figures: tuple[figures.Figure, ...]
  loss_unit: Callable[[Any], str]
  pictures: Callable[[], Sequence[Any]]
  brief: Callable[[Any], str] = lambda run: "its default sizes"
  facts: Callable[[Any, Mapping[str, Any]], list[tuple[str, Any]]] = lambda run, parents: []
  summary: Mapping[str, str] = dataclasses.field(default_factory=dict)
