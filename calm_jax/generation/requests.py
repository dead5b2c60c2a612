"""What a text is asked for, and how it is drawn: one dataclass each, checked."""

import dataclasses
import math

from calm_jax import config, errors
from calm_jax.generation import rules

# What becomes of a patch whose draws end before its rule has settled.
AT_LIMIT = {
  "batch": "the batch rule chooses among the draws that were made",
  "error": "the run ends",
}


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
  num_candidates: int = 200
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
    rule: see `rules`.
    at_limit: see AT_LIMIT.
  """

  rule: str = "first"
  at_limit: str = "batch"

  def __post_init__(self):
    for name, table in (("rule", rules.RULES), ("at_limit", AT_LIMIT)):
      value = getattr(self, name)
      config.require(value in table, f"{name} is {value!r}: {config.nearest(value, table)}")
