"""Compiled functions -> seconds."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def median_seconds(function: Callable[[], Any], repetitions: int) -> float:
  """Returns the median time of `repetitions` calls; a call before them compiles."""
  jax.block_until_ready(function())
  seconds = []
  for _ in range(repetitions):
    start = time.perf_counter()
    jax.block_until_ready(function())
    seconds.append(time.perf_counter() - start)
  return float(np.median(seconds))
