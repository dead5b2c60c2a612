"""A trained stage -> its decoder, which generates text."""

from collections.abc import Callable

from calm_jax import errors
from calm_jax.generation import decode, requests, writing
from calm_jax.stages import table
from calm_jax.training import trained as trained_lib


def require_writing(run, name: str, advice: str = "") -> writing.Writing:
  """Returns how a run's stage generates text.

  Args:
    name: start of the error message, such as "W holds".
    advice: end of the error message.

  Raises:
    CalmError: for a stage that generates none.
  """
  spec = table.of(run)
  if spec.writing is None:
    raise errors.CalmError(f"{name} {spec.title}, which generates no text{advice}")
  return spec.writing


def decoder(
  trained: trained_lib.Trained, sampler: requests.Sampler, report: Callable[[str], None]
) -> decode.Decoder:
  """Returns the decoder of a trained stage.

  Raises:
    CalmError: for a stage that generates no text.
  """
  law = require_writing(trained.run, "this is").law(trained, sampler)
  return decode.Decoder(trained, law, sampler, report)
