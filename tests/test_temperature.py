"""Claims about temperatures and the weights of draws, computed by hand."""

import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import errors
from calm_jax.generation import temperature


def weights(letters: str, power: float) -> dict[str, float]:
  """Returns the probability of each letter when one draw of a pool is chosen."""
  count_1N = jnp.array([[letters.count(letter) for letter in letters]])
  weight_N = np.exp(temperature.log_weights(count_1N, jnp.array([power]))[0])
  total: dict[str, float] = {}
  for letter, weight in zip(letters, weight_N, strict=True):
    total[letter] = total.get(letter, 0.0) + float(weight)
  mass = sum(total.values())
  return {letter: value / mass for letter, value in total.items() if value}


def test_the_published_pool_gives_the_published_probabilities():
  assert weights("ACADBEAFBG", 2) == pytest.approx({"A": 0.75, "B": 0.25}, rel=1e-4)


def test_without_repeated_draws_all_draws_have_equal_weights():
  assert weights("ABCD", 3) == pytest.approx({letter: 0.25 for letter in "ABCD"})


def test_the_largest_power_that_some_count_reaches_is_used():
  assert weights("AAABBBBCC", 3) == pytest.approx({"A": 0.2, "B": 0.8}, rel=1e-4)  # C(3,3), C(4,3).
  assert weights("AABBC", 3) == pytest.approx({"A": 0.5, "B": 0.5})


def test_at_temperature_one_weights_are_counts():
  assert weights("AAB", 1) == pytest.approx({"A": 2 / 3, "B": 1 / 3}, rel=1e-5)


def test_a_fractional_power_gives_generalized_binomial_weights():
  """C(3, 3/2) = 3!/(Γ(5/2) Γ(5/2)), C(1, 3/2) = 1/(Γ(5/2) Γ(1/2)): 8 to 1 over all draws."""
  assert weights("AAAB", 1.5) == pytest.approx({"A": 8 / 9, "B": 1 / 9}, rel=1e-4)


def test_the_weights_are_continuous_at_integer_powers():
  for pool in ("AAABBC", "ABC", "AABC"):
    for power in (2, 3):
      expected = weights(pool, power)
      for near in (power - 1e-3, power + 1e-3):
        close = weights(pool, near)
        assert all(abs(close.get(x, 0) - expected.get(x, 0)) < 0.01 for x in pool), (pool, near)


def test_slots_without_a_draw_have_weight_zero():
  log_1N = temperature.log_weights(jnp.array([[2, 2, 1, 0]]), jnp.array([2.0]))
  np.testing.assert_array_equal(jnp.isfinite(log_1N), [[True, True, False, False]])


@pytest.mark.parametrize(
  ("value", "power"), [(1.0, 1), (0.5, 2), (0.3333, 3), (0.333, 3), (0.1, 10), (0.7, 1 / 0.7)]
)
def test_powers_near_integers_are_rounded(value: float, power: float):
  assert temperature.power(value) == power


def test_the_power_of_a_tiny_temperature_is_infinite():
  assert temperature.power(1e-320) == float("inf")


@pytest.mark.parametrize("value", [0.25, 1.0, 7.0])
def test_single_tokens_have_probabilities_raised_to_one_over_t(value: float):
  logits_1V = np.array([[3.0, 1.0, 2.5]])
  power = temperature.token_power(value)
  law_1V = np.exp(temperature.tempered(jnp.array(logits_1V), jnp.array([power])))
  expected_1V = np.exp(logits_1V) ** (1 / value)
  np.testing.assert_allclose(
    law_1V / law_1V.sum(), expected_1V / expected_1V.sum(), rtol=1e-5, atol=1e-9
  )


@pytest.mark.parametrize("value", [1e-30, 1e-37, 1e-39, 5e-324])
def test_near_temperature_0_only_the_most_likely_tokens_remain(value: float):
  power_B = jnp.array([temperature.token_power(value)] * 2, jnp.float32)
  logits_BV = jnp.array([[90.0, 100.0, -3.0], [-2.0, -1.0, -1.0]])
  law_BV = np.exp(temperature.tempered(logits_BV, power_B))
  np.testing.assert_array_equal(law_BV, [[0, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), 1e39])
def test_an_invalid_temperature_of_single_tokens_is_refused(value: float):
  with pytest.raises(errors.CalmError, match="must be above 0 and finite"):
    temperature.token_power(value)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5, float("nan")])
def test_temperatures_out_of_range_are_refused_with_their_value(value: float):
  with pytest.raises(errors.CalmError, match=f"got {value}"):
    temperature.power(value)
