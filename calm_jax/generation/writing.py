"""The interface of a stage that generates text, for generation, evaluation and cost counting."""

import dataclasses
from collections.abc import Callable
from typing import Any

from calm_jax.generation import cost, laws, requests


@dataclasses.dataclass(frozen=True)
class Writing:
  """Functions of a stage that generates text.

  Attributes:
    law: (trained, sampler) -> distribution of the next patch, given hidden states.
    parts: job -> costs of generating a patch, by part of the model.
    tradeoff: (trained, store, temperatures, num_candidates, samplers, patches, seed) -> rows of
      `generation.tradeoff`.
    takes_candidates: whether a patch below temperature 1 may take several draws.
    rule: the rule by default, below temperature 1.
  """

  law: Callable[[Any, Any], laws.Law]
  parts: Callable[[cost.WritingJob], list[cost.Part]]
  tradeoff: Callable[..., list[dict[str, Any]]]
  takes_candidates: bool
  rule: str = requests.Sampler.rule
