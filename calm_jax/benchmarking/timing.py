"""Actions -> seconds, once they are compiled."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def median_seconds(action: Callable[[], Any], repetitions: int) -> float:
  """Returns the median of some runs after a first one, which compiles."""
  jax.block_until_ready(action())
  taken = []
  for _ in range(repetitions):
    start = time.perf_counter()
    jax.block_until_ready(action())
    taken.append(time.perf_counter() - start)
  return float(np.median(taken))
