"""What a checkpoint says of itself: step, run, data position, fingerprints, and a hash."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from calm_jax import errors, sealed_json


def require(values: Any, place: epath.Path, bound: str = "") -> None:
  """Raises unless a checkpoint's meta is the one that was saved there.

  Args:
    place: the checkpoint's folder, named after its step.
    bound: of the workdir's seal; empty for any.

  Raises:
    ValueError: if it was changed.
    CalmError: if it is whole, but of another run or another step.
  """
  if not isinstance(values, dict):
    raise ValueError("its meta holds no object")
  try:
    sealed_json.unsealed(values, "its meta")
  except errors.CalmError as error:
    raise ValueError("its meta was changed since it was saved") from error
  if bound and values.get("seal") != bound:
    raise errors.CalmError(f"{place} is a checkpoint of another run: put back this run's own")
  if str(values["step"]) != place.name:
    raise errors.CalmError(
      f"{place} holds the checkpoint of step {values['step']}: put back the one that was there"
    )


def require_fingerprint(values: Mapping[str, Any], name: str, found: str) -> None:
  """Raises ValueError unless `params` or `rest` that were read are those that were saved."""
  expected = values[f"{name}_fingerprint"]
  if found != expected:
    raise ValueError(f"{name} have fingerprint {found}, {expected} was saved: damaged")


@dataclasses.dataclass(frozen=True)
class Taken:
  """The steps of a run so far: how many, and how many examples of the stream each took.

  The batch may be another one in every attempt. A step that takes its batch again takes
  no example.
  """

  parts: tuple[tuple[int, int], ...] = ()

  def after(self, steps: int, examples: int) -> "Taken":
    """Returns these and `steps` more of `examples` each."""
    if not steps:
      return self
    *before, (last, each) = self.parts or ((0, examples),)
    if each == examples:
      return Taken((*before, (last + steps, each)))
    return Taken((*self.parts, (steps, examples)))

  def to_json(self) -> list[list[int]]:
    """Returns what a checkpoint keeps of it, beside the position of the data."""
    return [list(part) for part in self.parts]

  @classmethod
  def of(cls, data: Mapping[str, Any], step: int) -> "Taken":
    """Returns what a checkpoint kept.

    Raises:
      CalmError: if its data position does not follow from its steps.
    """
    found = cls(tuple((steps, examples) for steps, examples in data["taken"]))
    steps, position = sum(steps for steps, _ in found.parts), data["global_next_index"]
    if (steps, found._examples) != (step, position):
      raise errors.CalmError(
        f"the checkpoint of step {step} has data position {position}, but {steps} steps with "
        f"batches {found.to_json()} end at {found._examples}: put back the one that was saved"
      )
    return found

  @property
  def _examples(self) -> int:
    return sum(steps * examples for steps, examples in self.parts)
