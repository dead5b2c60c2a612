"""JSON objects that carry their own hash, so that truncation and edits are detected."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from calm_jax import errors

FIELD = "sha256"


def digest(values: Any) -> str:
  """Returns the SHA-256 of JSON values in canonical form, as hexadecimal digits.

  The canonical form has sorted keys, no spaces, and escapes for non-ASCII characters.
  """
  return hashlib.sha256(
    json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
  ).hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the values with their hash added as `sha256`."""
  return {**values, FIELD: digest(values)}


def unsealed(values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns the values without their hash, after checking it: the inverse of `sealed`.

  Args:
    values: values that `sealed` returned.
    where: names the values in errors.

  Raises:
    CalmError: if the values were changed since they were sealed.
  """
  rest = {name: value for name, value in values.items() if name != FIELD}
  try:
    actual = digest(rest)
  except RecursionError as error:
    raise errors.CalmError(f"{where} is damaged: nested too deep") from error
  if actual != values.get(FIELD):
    raise errors.CalmError(
      f"{where} is damaged: its fields have SHA-256 {actual[:16]}, but it says "
      f"{str(values.get(FIELD))[:16]}"
    )
  return rest
