"""How a stage writes text: what generation, measuring and counting ask of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

from calm_jax.generation import cost, laws


@dataclasses.dataclass(frozen=True)
class Writing:
  """A stage that writes text.

  Attributes:
    law: (trained, sampler) -> the law of the next patch, given hidden states.
    parts: what writing a patch costs, part by part.
    tradeoff: (trained, store, temperatures, num_candidates, samplers, patches, seed) -> rows of
      `generation.tradeoff`.
    takes_candidates: whether a patch below temperature 1 takes several draws.
  """

  law: Callable[[Any, Any], laws.Law]
  parts: Callable[[cost.WritingJob], list[cost.Part]]
  tradeoff: Callable[..., list[dict[str, Any]]]
  takes_candidates: bool
