"""How reports and model cards show a stage."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from calm_jax.training import figures


@dataclasses.dataclass(frozen=True)
class Presentation:
  """A stage for people.

  Attributes:
    heading: of its section in a report. title: of its model card.
    settings: dotted names of the settings that shape it, in the order in which they are shown.
    metrics, figures: what its loss and its evaluation report, in the order in which they are
      shown.
    loss_unit: settings -> the unit of the training loss.
    pictures: returns its `drawing.Picture`s; a function, so that matplotlib is imported by
      those alone who draw.
    brief: settings -> its sizes in a few words.
    writes: whether it writes text.
    facts: (settings, parents' settings) -> rows of its model card besides its settings.
    summary: name in summary.json -> figure of its evaluation.
  """

  heading: str
  title: str
  settings: tuple[str, ...]
  metrics: tuple[figures.Figure, ...]
  figures: tuple[figures.Figure, ...]
  loss_unit: Callable[[Any], str]
  pictures: Callable[[], Sequence[Any]]
  brief: Callable[[Any], str] = lambda run: "its default sizes"
  writes: bool = False
  facts: Callable[[Any, Mapping[str, Any]], list[tuple[str, Any]]] = lambda run, parents: []
  summary: Mapping[str, str] = dataclasses.field(default_factory=dict)
