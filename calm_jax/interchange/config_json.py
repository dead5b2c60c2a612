"""A config.json of another framework -> its settings, each validated before use."""

import math
import pathlib
from typing import Any

from calm_jax import config, errors, files
from calm_jax.interchange import tensors

# Values that all our models have; models with other values can't be converted.
_FIXED_VALUES = {
  "rms_norm_eps": 1e-6,
  "hidden_act": "silu",
  "attention_bias": False,
  "mlp_bias": False,
  "rope_scaling": None,
}
_MOST = 2**31  # Sizes and counts must be smaller.


class Settings:
  """The validated settings of a config.json."""

  def __init__(self, folder: pathlib.Path):
    self._path = folder / "config.json"
    self._values = files.read_json(self._path)
    for name, ours in _FIXED_VALUES.items():
      value = self._values.get(name, ours)
      if value != ours:
        raise errors.CalmError(
          f"{self._path}: {name} is {config.shown(value)}; only {ours!r} can be converted"
        )
    rope = self._values.get("rope_parameters") or {}  # Written by newer versions of transformers.
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else rope
    if kind != "default":
      raise errors.CalmError(
        f"{self._path}: rope_type is {config.shown(kind)}; only 'default' can be converted"
      )
    self._values |= rope if isinstance(rope, dict) else {}

  def number(self, name: str, default: int | float | None = None) -> Any:
    """Returns a positive number.

    Raises:
      CalmError: if the setting is not one, or is missing without a default.
    """
    value = self._values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
      raise errors.CalmError(
        f"{self._path}: {name} must be a number above 0, got {config.shown(value)}"
      )
    if isinstance(value, int) and value >= _MOST:
      raise errors.CalmError(f"{self._path}: {name} must be below 2^31, got {config.shown(value)}")
    return value

  def whole(self, name: str, default: int | None = None) -> int:
    """Returns a positive integer; see `number`."""
    value = self.number(name, default)
    if not isinstance(value, int):
      raise errors.CalmError(f"{self._path}: {name} must be a whole number, got {value!r}")
    return value

  def context(self, tokens: int = 1) -> int:
    """Returns the tokens per example, given the tokens per position."""
    name = "max_position_embeddings"
    positions = self.whole(name, 2048)
    if positions < 2 or positions * tokens >= _MOST:
      raise errors.CalmError(
        f"{self._path}: {name} must be at least 2, to predict the second position from the first, "
        f"and below {_MOST // tokens}; got {positions}"
      )
    return positions * tokens

  def text(self, name: str) -> str:
    """Returns a string, empty if the setting is missing or not a string."""
    value = self._values.get(name)
    return value if isinstance(value, str) else ""

  def has(self, name: str) -> bool:
    """Returns whether the setting is present and not null."""
    return self._values.get(name) is not None

  @property
  def tied(self) -> bool:
    """Whether the output layer shares the token table."""
    return bool(self._values.get("tie_word_embeddings", False))

  @property
  def eos_id(self) -> int | None:
    """The id of the token that ends a document, the first if there are several."""
    value = self._values.get("eos_token_id")
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) and not isinstance(first, bool) else None

  @property
  def dtype(self) -> Any:
    """The type of activations if we support it, else float32."""
    name = self.text("torch_dtype") or self.text("dtype")
    return name if name in ("float32", "bfloat16") else "float32"

  def require(self, **sizes: int) -> None:
    """Raises CalmError if a named setting is present and differs from the weights' value."""
    for name, value in sizes.items():
      stated = self._values.get(name)
      if stated is not None and stated != value:
        raise errors.CalmError(
          f"{self._path} says {name} = {config.shown(stated)}, but its weights have {value!r}"
        )

  def vocab_size(self, name: str, table: tensors.Stored) -> int:
    """Returns the rows of a token table, which may have one more than the setting says.

    Args:
      name: name of the table, for errors.
      table: the table.

    Raises:
      CalmError: if the number of rows contradicts the setting.
    """
    rows, stated = table.shape[0], self.whole("vocab_size", table.shape[0])
    if rows not in (stated, stated + 1):
      raise errors.CalmError(f"{self._path} says vocab_size = {stated}, but {name} has {rows} rows")
    return rows
