"""Requests for texts, and the sampler that draws them: one validated dataclass each."""

import dataclasses

from calm_jax import config
from calm_jax.generation import choosers, rules

ERROR = "error"
# Largest values. Tokens are counted in 32 bits.
MOST = {"num_candidates": config.MOST_DRAWS, "max_tokens": 2**30, "number": config.LARGEST_INT}


@dataclasses.dataclass(frozen=True)
class Request:
  """A request for one text.

  Attributes:
    prompt: tokens of the prompt.
    temperature: 1 is the model's own distribution. For CALM in (0, 1]. For the baseline any value
      above 0; towards 0 the most likely token is taken.
    num_candidates: N, the maximum number of CALM's draws per patch below temperature 1.
    max_tokens: new tokens after which the text ends without EOS.
    seed, number: the same pair gives the same text, whatever else is in the batch.
    stop: strings before which the text ends.
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
      config.require(config.is_text(stop), f"a stop string is not valid text: {stop!a}")


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How CALM draws below temperature 1, for all texts alike.

  Attributes:
    rule: settles a patch before its draws end; see `rules`.
    at_limit: chooses among the draws if they end first; see `choosers`. ERROR raises.
    draw_temperature: temperature of the draws that are compared, for heads that read it; 0 for that
      of the rule: the text's own for `direct`, else 1.
  """

  rule: str = "first"
  at_limit: str = "prefix"
  draw_temperature: float = 0.0

  def __post_init__(self):
    for name, table in (("rule", rules.RULES), ("at_limit", [*choosers.CHOOSERS, ERROR])):
      value = getattr(self, name)
      config.require(value in table, f"{name} is {value!r}: {config.nearest(value, table)}")
    config.require(
      (self.rule, self.at_limit) != ("none", ERROR),
      "rule none never settles a patch, so at_limit error would always be one: give another",
    )
