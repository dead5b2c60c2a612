"""Claims about temperatures and weights, by hand."""

import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import errors
from calm_jax.generation import temperature


def weights(letters: str, power: float) -> dict[str, float]:
  """The law of one draw of a pool."""
  count_1N = jnp.array([[letters.count(letter) for letter in letters]])
  weight_N = np.exp(temperature.log_weights(count_1N, jnp.array([power]))[0])
  total: dict[str, float] = {}
  for letter, weight in zip(letters, weight_N, strict=True):
    total[letter] = total.get(letter, 0.0) + float(weight)
  mass = sum(total.values())
  return {letter: value / mass for letter, value in total.items() if value}


def test_the_published_pool_gives_a_three_quarters():
  assert weights("ACADBEAFBG", 2) == pytest.approx({"A": 0.75, "B": 0.25}, rel=1e-4)


def test_without_a_repeat_the_rule_falls_back_to_single_draws():
  assert weights("ABCD", 3) == pytest.approx({letter: 0.25 for letter in "ABCD"})


def test_the_largest_m_that_some_patch_reaches_decides():
  assert weights("AAABBBBCC", 3) == pytest.approx({"A": 0.2, "B": 0.8}, rel=1e-4)  # C(3,3), C(4,3).
  assert weights("AABBC", 3) == pytest.approx({"A": 0.5, "B": 0.5})


def test_at_temperature_one_draws_weigh_what_they_occur():
  assert weights("AAB", 1) == pytest.approx({"A": 2 / 3, "B": 1 / 3}, rel=1e-5)


def test_a_power_between_two_whole_ones_by_hand():
  """C(3, 3/2) = 3!/(Γ(5/2) Γ(5/2)), C(1, 3/2) = 1/(Γ(5/2) Γ(1/2)): 8 to 1 in all."""
  assert weights("AAAB", 1.5) == pytest.approx({"A": 8 / 9, "B": 1 / 9}, rel=1e-4)


def test_the_weights_go_over_into_each_other_where_the_power_is_whole():
  for pool in ("AAABBC", "ABC", "AABC"):
    for power in (2, 3):
      exactly = weights(pool, power)
      for near in (power - 1e-3, power + 1e-3):
        close = weights(pool, near)
        assert all(abs(close.get(x, 0) - exactly.get(x, 0)) < 0.01 for x in pool), (pool, near)


def test_places_without_a_draw_weigh_nothing():
  log_1N = temperature.log_weights(jnp.array([[2, 2, 1, 0]]), jnp.array([2.0]))
  np.testing.assert_array_equal(jnp.isfinite(log_1N), [[True, True, False, False]])


@pytest.mark.parametrize(
  ("value", "power"), [(1.0, 1), (0.5, 2), (0.3333, 3), (0.333, 3), (0.1, 10), (0.7, 1 / 0.7)]
)
def test_powers(value: float, power: float):
  assert temperature.power(value) == power


def test_a_temperature_too_small_for_its_power_asks_for_more_draws_than_any():
  assert temperature.power(1e-320) == float("inf")


@pytest.mark.parametrize("value", [0.25, 1.0, 7.0])
def test_single_tokens_have_the_law_to_the_power_of_one_over_t(value: float):
  logits_1V = np.array([[3.0, 1.0, 2.5]])
  power = temperature.token_power(value)
  found_1V = np.exp(temperature.tempered(jnp.array(logits_1V), jnp.array([power])))
  expected_1V = np.exp(logits_1V) ** (1 / value)
  np.testing.assert_allclose(
    found_1V / found_1V.sum(), expected_1V / expected_1V.sum(), rtol=1e-5, atol=1e-9
  )


@pytest.mark.parametrize("value", [1e-30, 1e-37, 1e-39, 5e-324])
def test_near_temperature_0_the_likeliest_tokens_alone_are_left(value: float):
  power_B = jnp.array([temperature.token_power(value)] * 2, jnp.float32)
  logits_BV = jnp.array([[90.0, 100.0, -3.0], [-2.0, -1.0, -1.0]])
  law_BV = np.exp(temperature.tempered(logits_BV, power_B))
  np.testing.assert_array_equal(law_BV, [[0, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), 1e39])
def test_a_temperature_that_is_none_is_refused_of_single_tokens(value: float):
  with pytest.raises(errors.CalmError, match="must be above 0 and finite"):
    temperature.token_power(value)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5, float("nan")])
def test_other_temperatures_are_refused_with_the_value(value: float):
  with pytest.raises(errors.CalmError, match=f"got {value}"):
    temperature.power(value)
