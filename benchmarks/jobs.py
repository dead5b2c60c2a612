"""What a benchmark trains, and what each contender must provide."""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, Protocol

WARM_UP = 3  # Steps before the first that counts.


@dataclasses.dataclass(frozen=True)
class BenchmarkJob:
  """What all contenders train.

  Attributes:
    name: name of the config, for tables.
    run: settings of its stage.
    parents: settings of the runs that its parents come from.
    vocab_size: V.
  """

  name: str
  run: Any
  parents: Mapping[str, Any]
  vocab_size: int

  def plain(self) -> "BenchmarkJob":
    """Returns the job with settings as plain objects, so that reading them imports no JAX."""
    parents = {name: _plain(dataclasses.asdict(run)) for name, run in self.parents.items()}
    return dataclasses.replace(self, run=_plain(dataclasses.asdict(self.run)), parents=parents)


def _plain(values: Any) -> Any:
  """Returns nested settings as attributes of plain objects."""
  if not isinstance(values, dict):
    return values
  return types.SimpleNamespace(**{name: _plain(value) for name, value in values.items()})


class Steps(Protocol):
  """Training steps of one contender."""

  def dispatch(self) -> Callable[[], None] | None:
    """Starts a step; returns a function that waits for its end, None if it has ended."""
    ...

  def facts(self) -> dict[str, Any]:
    """Returns other figures: `platform`, `device`, `versions`, seconds of parts."""
    ...
