"""Metadata of a checkpoint: step, run, data position, fingerprints, and a hash over them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from calm_jax import errors, sealed_json


def require(values: Any, place: epath.Path, bound: str = "") -> None:
  """Raises unless a checkpoint's metadata is what was saved there.

  Args:
    place: the checkpoint's folder, named after its step.
    bound: `bound` of the workdir's seal; empty to accept any.

  Raises:
    ValueError: if it was changed.
    CalmError: if it is intact, but belongs to another run or another step.
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


def require_fingerprint(values: Mapping[str, Any], name: str, actual: str) -> None:
  """Raises ValueError unless the `params` or `rest` that were read are what was saved."""
  expected = values[f"{name}_fingerprint"]
  if actual != expected:
    raise ValueError(f"{name} have fingerprint {actual}, {expected} was saved: damaged")


@dataclasses.dataclass(frozen=True)
class Taken:
  """Number of steps of a run so far, and how many examples of the stream each took.

  The batch size may differ between attempts. A step that reuses its batch takes no example.

  Attributes:
    parts: (steps, examples a step) of consecutive steps with one batch size.
  """

  parts: tuple[tuple[int, int], ...] = ()

  def after(self, steps: int, examples: int) -> "Taken":
    """Returns the record after `steps` more steps of `examples` examples each."""
    if not steps:
      return self
    *earlier, (last, per_step) = self.parts or ((0, examples),)
    if per_step == examples:
      return Taken((*earlier, (last + steps, examples)))
    return Taken((*self.parts, (steps, examples)))

  def to_json(self) -> list[list[int]]:
    """Returns the value that a checkpoint stores next to the data position."""
    return [list(part) for part in self.parts]

  @classmethod
  def of(cls, data: Mapping[str, Any], step: int) -> "Taken":
    """Returns what a checkpoint stored.

    Raises:
      CalmError: if its data position does not follow from its steps.
    """
    taken = cls(tuple((steps, examples) for steps, examples in data["taken"]))
    steps, position = sum(steps for steps, _ in taken.parts), data["global_next_index"]
    if (steps, taken._examples) != (step, position):
      raise errors.CalmError(
        f"the checkpoint of step {step} has data position {position}, but {steps} steps with "
        f"batches {taken.to_json()} end at {taken._examples}: put back the one that was saved"
      )
    return taken

  @property
  def _examples(self) -> int:
    return sum(steps * examples for steps, examples in self.parts)
