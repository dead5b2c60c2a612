import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import errors
from calm_jax.generation import temperature


def weights(letters, n, allowed=None):
  token_NK = jnp.array([[ord(letter), 0] for letter in letters])
  allowed_N = jnp.array([True] * len(letters) if allowed is None else allowed)
  found = np.asarray(temperature.batch_weights(token_NK, allowed_N, n))
  total = {}
  for letter, weight in zip(letters, found, strict=True):
    total[letter] = total.get(letter, 0.0) + float(weight)
  mass = sum(total.values())
  return {letter: value / mass for letter, value in total.items() if value}


def test_the_published_pool_gives_a_three_quarters():
  assert weights("ACADBEAFBG", 2) == pytest.approx({"A": 0.75, "B": 0.25})


def test_without_a_repeat_the_rule_falls_back_to_single_draws():
  assert weights("ABCD", 3) == pytest.approx({letter: 0.25 for letter in "ABCD"})


def test_the_largest_m_that_some_patch_reaches_decides():
  assert weights("AAABBBBCC", 3) == pytest.approx({"A": 0.2, "B": 0.8})  # C(3,3), C(4,3).
  assert weights("AABBC", 3) == pytest.approx({"A": 0.5, "B": 0.5})


def test_at_temperature_one_candidates_weigh_what_they_occur():
  assert weights("AAB", 1) == pytest.approx({"A": 2 / 3, "B": 1 / 3})


def test_what_is_not_allowed_is_neither_chosen_nor_counted():
  assert weights("AABBBC", 2, [False, True, True, True, False, True]) == pytest.approx({"B": 1.0})


def test_patches_are_compared_whole():
  token_NK = jnp.array([[1, 2], [1, 3], [4, 5], [4, 5]])
  found = temperature.batch_weights(token_NK, jnp.ones(4, bool), 2)
  np.testing.assert_allclose(found, [0, 0, 0.5, 0.5])


def test_the_known_bias_of_the_batch_rule_at_ten_and_two_hundred_candidates():
  """P = (.5, .3, .15, .05), n = 2: .641 at N = 10, .678 at N = 200, .685 in the limit."""
  law = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))

  def first(key, count):
    draw_key, choice_key = jax.random.split(key)
    token_NK = jax.random.categorical(draw_key, law, shape=(count, 1))
    weight_N = temperature.batch_weights(token_NK, jnp.ones(count, bool), 2)
    return token_NK[temperature.choose(choice_key, weight_N), 0] == 0

  keys = jax.random.split(jax.random.key(0), 20_000)
  for count, expected in ((10, 0.641), (200, 0.678)):
    share = float(jnp.mean(jax.lax.map(lambda key, n=count: first(key, n), keys, batch_size=1000)))
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / len(keys))


@pytest.mark.parametrize(("value", "n"), [(1.0, 1), (0.5, 2), (0.3333, 3), (0.25, 4), (0.1, 10)])
def test_reciprocals(value, n):
  assert temperature.reciprocal(value) == n


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5, float("nan"), 0.7, 0.4])
def test_other_temperatures_are_refused_with_the_value(value):
  with pytest.raises(errors.CalmError, match=f"got {value}"):
    temperature.reciprocal(value)
