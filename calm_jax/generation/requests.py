"""What a text is asked for, and how it is drawn: one dataclass each, checked."""

import dataclasses

from calm_jax import config
from calm_jax.generation import choosers, rules

ERROR = "error"
# Largest values; tokens are counted in 32 bits.
MOST = {"num_candidates": config.MOST_DRAWS, "max_tokens": 2**30, "number": config.LARGEST_INT}


@dataclasses.dataclass(frozen=True)
class Request:
  """One text.

  Attributes:
    prompt: its tokens.
    temperature: 1 is the model's own law. CALM: (0, 1]; the baseline: any above 0, where
      towards 0 the likeliest token is taken.
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
    config.require(
      0 < self.temperature <= config.FLOATS[1],
      f"temperature must be above 0 and finite, got {config.shown(self.temperature)}",
    )
    for name in ("max_tokens", "num_candidates"):
      value = getattr(self, name)
      config.require(
        1 <= value <= MOST[name],
        f"{name} must lie in [1, {MOST[name]}], got {config.shown(value)}",
      )
    for name, most in (("seed", 2**32 - 1), ("number", MOST["number"])):
      value = getattr(self, name)
      config.require(
        0 <= value <= most, f"{name} must lie in [0, {most}], got {config.shown(value)}"
      )
    for stop in self.stop:
      config.require(stop != "", "a stop string is empty: leave it out")
      config.require(config.is_text(stop), f"a stop string is no text: {stop!a}")


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
