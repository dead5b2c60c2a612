"""Claims about argmax: every implementation returns the first of the largest logits."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax.kernels import argmax

FORMS = (argmax.plain, argmax.most_likely, argmax._by_maximum, argmax._by_tiles)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vocab_size", [3, 100, 64 * 7])
def test_every_implementation_returns_the_first_of_the_largest_logits(vocab_size: int, form):
  """Logits have few distinct values, so that each row has ties."""
  logits_BV = np.random.default_rng(0).integers(-9, 0, (50, vocab_size)).astype(np.float32)
  logits_BV[0] = 1.0
  index_B = jax.jit(form)(jnp.asarray(logits_BV))
  assert index_B.dtype == jnp.int32
  np.testing.assert_array_equal(index_B, np.argmax(logits_BV, axis=-1))


def test_an_index_is_in_range_where_all_logits_are_nan():
  assert argmax.most_likely(jnp.full(3, jnp.nan)) in range(3)
