"""What a text is asked for, and how it is drawn: one dataclass each, checked."""

import dataclasses
import math

from calm_jax import config, errors
from calm_jax.generation import choosers, rules

ERROR = "error"


@dataclasses.dataclass(frozen=True)
class Request:
  """One text.

  Attributes:
    prompt: its tokens.
    temperature: 1 is the model's own law. CALM: (0, 1]; the baseline: any above 0.
    num_candidates: N, CALM's draws a patch at most below temperature 1.
    max_tokens: new tokens after which it ends without EOS.
    seed, number: the same two give the same text, whatever else is in the batch.
    stop: strings before which it ends.
  """

  prompt: tuple[int, ...] = ()
  temperature: float = 1.0
  num_candidates: int = 32
  max_tokens: int = 256
  seed: int = 0
  number: int = 0
  stop: tuple[str, ...] = ()

  def __post_init__(self):
    if not (math.isfinite(self.temperature) and self.temperature > 0):
      raise errors.CalmError(f"temperature must be above 0, got {self.temperature}")
    for name in ("max_tokens", "num_candidates"):
      config.require(
        getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}"
      )
    config.require(0 <= self.seed < 2**32, f"seed must lie in [0, 2^32), got {self.seed}")
    config.require(all(self.stop), "a stop string is empty: leave it out")


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How CALM draws below temperature 1, the same for all texts.

  Attributes:
    rule: what settles a patch before its draws end; see `rules`.
    at_limit: what chooses among the draws where they do; see `choosers`. ERROR: nothing.
  """

  rule: str = "first"
  at_limit: str = "prefix"

  def __post_init__(self):
    for name, table in (("rule", rules.RULES), ("at_limit", [*choosers.CHOOSERS, ERROR])):
      value = getattr(self, name)
      config.require(value in table, f"{name} is {value!r}: {config.nearest(value, table)}")
    config.require(
      (self.rule, self.at_limit) != ("none", ERROR),
      "rule none never settles a patch, so at_limit error would always be one: give another",
    )
