"""JSON objects that carry a hash of themselves, so that one that was cut or edited is told."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from calm_jax import errors

FIELD = "sha256"


def digest(values: Any) -> str:
  """Returns the SHA-256 of JSON values in canonical form, as hexadecimal digits.

  Canonical is: keys sorted, no spaces, letters beyond ASCII escaped.
  """
  return hashlib.sha256(
    json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
  ).hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the values with their hash beside them, as `sha256`."""
  return {**values, FIELD: digest(values)}


def unsealed(values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns what `sealed` was given.

  Args:
    where: names the values in errors.

  Raises:
    CalmError: if they are not as they were sealed.
  """
  rest = {name: value for name, value in values.items() if name != FIELD}
  try:
    found = digest(rest)
  except RecursionError as error:
    raise errors.CalmError(f"{where} is damaged: nested too deep") from error
  if found != values.get(FIELD):
    raise errors.CalmError(
      f"{where} is damaged: its fields have SHA-256 {found[:16]}, it says "
      f"{str(values.get(FIELD))[:16]}"
    )
  return rest
