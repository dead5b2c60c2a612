"""Claims about rounds of draws: patches have the distribution of their rule at any round size."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest
import scipy.special
from jax import numpy as jnp

from calm_jax.generation import candidates, choosers, rules

LAW = np.array([0.5, 0.3, 0.15, 0.05])
ROWS = 500


def draw_from(law: np.ndarray, key_B: jax.Array):
  """Returns a function that draws patches of two tokens, (x, 2x), where x is drawn from `law`."""

  def draw(row_S, number_S):
    keys_S = candidates.keys_of(key_B[row_S], candidates.DRAW, number_S)
    x_S = jax.vmap(lambda key: jax.random.categorical(key, jnp.log(law)))(keys_S)
    return candidates.Candidate(jnp.stack([x_S, 2 * x_S], axis=1).astype(jnp.int32), None)

  return draw


def wanted(seed: int, power: float, limit: int, tail=(), rows: int = ROWS, attempts: int = 10**6):
  tail_K = np.zeros(2, np.int32)
  tail_K[: len(tail)] = tail
  return candidates.Wanted(
    key_B=jax.random.split(jax.random.key(seed), rows),
    power_B=jnp.full(rows, power),
    draw_power_B=jnp.ones(rows),
    limit_B=jnp.full(rows, limit),
    attempts_B=jnp.full(rows, attempts),
    tail_BK=jnp.broadcast_to(tail_K, (rows, 2)),
    length_B=jnp.full(rows, len(tail)),
    active_B=jnp.ones(rows, bool),
  )


@functools.partial(jax.jit, static_argnames=("rule", "slots", "sizes", "chooser"))
def _choose(requests, law, rule, slots, sizes, chooser="batch"):
  drawing, choosing = draw_from(law, requests.key_B), choosers.CHOOSERS[chooser]
  return candidates.choose(requests, drawing, rules.RULES[rule], choosing, slots, list(sizes))


def outcomes(rule: str, power: float, limit: int, batches: int, law=LAW, **settings):
  """Returns the choices of `batches` times ROWS rows."""
  sizes = tuple(candidates.round_sizes(ROWS, 1, limit))
  choices = [
    _choose(wanted(seed, power, limit, **settings), law, rule, limit, sizes)
    for seed in range(batches)
  ]
  return jax.tree.map(lambda *x: np.concatenate(x), *choices)


# Batches of rows for a test of a distribution: 10,000 draws here, 100,000 by hand.
BATCHES = pytest.mark.parametrize("batches", [20, pytest.param(200, marks=pytest.mark.exhaustive)])


def chi_square(draws: np.ndarray, law: np.ndarray) -> float:
  expected = law / law.sum() * len(draws)
  return float(np.sum((np.bincount(draws, minlength=len(law)) - expected) ** 2 / expected))


# Quantile of the chi-square distribution at 1 - 1e-4 with 3 degrees of freedom.
LIMIT = 21.1


@BATCHES
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.5, 0.4])
def test_exact_draws_have_the_exact_distribution_and_the_expected_number(
  temperature: float, batches: int
):
  power = 1 / temperature
  result = outcomes("exact", power, 200, batches)
  assert result.settled_B.all()
  assert chi_square(result.patch.token_K[:, 0], LAW**power) < LIMIT
  n = int(power + 1e-9)
  first_stage = 1 + sum((LAW**j).sum() for j in range(1, n))
  second_stage = (LAW ** (power - 1)).sum() if power > n + 1e-9 else 0.0
  expected = (first_stage + second_stage) / (LAW**power).sum()
  error = result.seen_B.std() / len(result.seen_B) ** 0.5
  assert abs(result.seen_B.mean() - expected) < 4 * error + 1e-9


def race(power: float) -> np.ndarray:
  """Returns the distribution of the first patch drawn n times, times P^a, over all sequences."""
  n, won = int(power), np.zeros(len(LAW))
  ways = {(0,) * len(LAW): 1.0}
  while ways:
    after: dict[tuple[int, ...], float] = {}
    for counts, weight in ways.items():
      for x, p in enumerate(LAW):
        if counts[x] == n - 1:
          won[x] += weight * p
        else:
          grown = (*counts[:x], counts[x] + 1, *counts[x + 1 :])
          after[grown] = after.get(grown, 0.0) + weight * p
    ways = after
  return won * LAW ** (power - n)


@BATCHES
@pytest.mark.parametrize("power", [2.0, 3.0, 2.5])
def test_the_first_patch_drawn_n_times_has_the_distribution_of_the_race(power: float, batches: int):
  result = outcomes("first", power, 120, batches)
  assert result.settled_B.all()
  assert chi_square(result.patch.token_K[:, 0], race(power)) < LIMIT


def weight(count: int, level: float) -> float:
  gamma = scipy.special.gamma
  return gamma(count + 1) / gamma(count - level + 1) if count >= max(int(level), 1) else 0.0


def shares(counts: np.ndarray, power: float) -> np.ndarray:
  """Returns the distribution of the choice, given how often each outcome was drawn."""
  level = power - max(int(power) - max(counts), 0)
  weights = np.array([weight(count, level) for count in counts])
  return weights / weights.sum()


def batch_law(power: float, limit: int) -> np.ndarray:
  """Returns the distribution of the batch rule, summed over all counts of `limit` draws."""
  law = np.zeros(len(LAW))
  for counts in itertools.product(range(limit + 1), repeat=len(LAW)):
    if sum(counts) != limit:
      continue
    ways = math.factorial(limit) / math.prod(map(math.factorial, counts))
    law += ways * np.prod(LAW**counts) * shares(counts, power)
  return law


@BATCHES
@pytest.mark.parametrize("power", [2.0, 3.0, 2.5, 1.25])
def test_the_batch_rule_has_the_distribution_of_its_weights(power: float, batches: int):
  result = outcomes("none", power, 10, batches)
  assert not result.settled_B.any() and (result.drawn_B == 10).all()
  assert chi_square(result.patch.token_K[:, 0], batch_law(power, 10)) < LIMIT


@BATCHES
def test_the_batch_rule_chooses_when_the_draws_run_out(batches: int):
  """With three draws: settled if the first two are equal, otherwise chosen by the batch rule."""
  result = outcomes("exact", 2.0, 3, batches)
  law, settled = np.zeros(len(LAW)), 0.0
  for sequence in itertools.product(range(len(LAW)), repeat=3):
    p = np.prod(LAW[list(sequence)])
    counts = np.bincount(sequence, minlength=len(LAW))
    weights = counts * (counts - 1) if counts.max() > 1 else counts
    if sequence[0] == sequence[1]:
      law[sequence[0]] += p
      settled += p
    else:
      law += p * weights / weights.sum()
  assert chi_square(result.patch.token_K[:, 0], law) < LIMIT
  count = len(result.settled_B)
  assert abs(result.settled_B.mean() - settled) < 4 * (settled * (1 - settled) / count) ** 0.5


@BATCHES
@pytest.mark.parametrize("power", [2.0, 2.5])
def test_the_prefix_rule_gives_each_token_the_distribution_of_its_weights(
  power: float, batches: int
):
  """Patches (x // 2, x), with the distribution summed over all sequences of four draws."""
  law = np.zeros(4)
  for sequence in itertools.product(range(4), repeat=4):
    p = np.prod(LAW[list(sequence)])
    first = np.bincount([x // 2 for x in sequence], minlength=2)
    for begin, share in enumerate(shares(first, power)):
      counts = np.bincount([x for x in sequence if x // 2 == begin], minlength=4)
      if share:
        law += p * share * shares(counts, power)

  @jax.jit
  def chosen(key):
    draw_key, choice_key = jax.random.split(key)
    x_BN = jax.random.categorical(draw_key, jnp.log(LAW), shape=(ROWS, 4))
    token_BNK = jnp.stack([x_BN // 2, x_BN], axis=-1)
    index_B = choosers.prefix(
      token_BNK,
      jnp.ones((ROWS, 4), bool),
      jnp.full(ROWS, power),
      jax.random.split(choice_key, ROWS),
    )
    return jnp.take_along_axis(x_BN, index_B[:, None], axis=1)[:, 0]

  x_B = np.concatenate([chosen(jax.random.key(seed)) for seed in range(batches)])
  assert chi_square(x_B, law) < LIMIT


def test_with_a_tail_only_draws_that_begin_with_it_count():
  """x is the first token of a patch, so only draws of x = 1 count, 0.3 of all."""
  result = outcomes("exact", 2.0, 50, 1, tail=(1,))
  assert (result.patch.token_K == [1, 2]).all() and (result.longest_B == 1).all()
  assert (result.seen_B == 2).all()
  assert abs(result.agreed_B.sum() / result.drawn_B.sum() - 0.3) < 0.05


def test_a_tail_that_no_draw_matches_gives_the_draw_with_the_longest_match():
  result = outcomes("exact", 2.0, 50, 1, tail=(1, 3), attempts=20)
  assert (result.agreed_B == 0).all() and (result.drawn_B == 20).all()
  near_B = result.longest_B == 1  # One of the twenty draws was 1.
  assert near_B.mean() > 0.98 and (result.patch.token_K[near_B, 0] == 1).all()


@pytest.mark.parametrize("rule", sorted(rules.RULES))
def test_round_sizes_and_other_rows_do_not_change_the_draws_of_a_row(rule: str):
  requests = wanted(3, 2.5, 30)
  small = _choose(requests, LAW, rule, 30, (ROWS,))
  large = _choose(requests, LAW, rule, 30, (2 * ROWS, 7 * ROWS))
  np.testing.assert_array_equal(small.patch.token_K, large.patch.token_K)
  np.testing.assert_array_equal(small.seen_B, large.seen_B)
  alone = _choose(jax.tree.map(lambda x: x[7:8], requests), LAW, rule, 30, (4,))
  np.testing.assert_array_equal(alone.patch.token_K[0], small.patch.token_K[7])


def test_settled_and_inactive_rows_make_no_more_draws():
  requests = wanted(0, 1.0, 100)._replace(active_B=jnp.arange(ROWS) % 2 == 0)
  result = _choose(requests, LAW, "first", 100, (ROWS // 2,))
  np.testing.assert_array_equal(result.drawn_B, jnp.arange(ROWS) % 2 == 0)


def test_each_row_has_its_own_temperature_and_number_of_draws():
  requests = wanted(5, 1.0, 40)
  cold_B = jnp.arange(ROWS) % 2 == 0
  requests = requests._replace(
    power_B=jnp.where(cold_B, 30.0, 1.0), limit_B=jnp.where(cold_B, 40, 1)
  )
  result = _choose(requests, LAW, "none", 40, (ROWS,))
  np.testing.assert_array_equal(result.drawn_B, np.where(cold_B, 40, 1))
  assert (result.patch.token_K[cold_B, 0] == 0).mean() > 0.9
  assert abs((result.patch.token_K[~cold_B, 0] == 0).mean() - 0.5) < 0.15


def test_round_sizes_grow_from_the_smallest_number_of_draws_needed():
  assert candidates.round_sizes(1, 3, 200) == [8, 16, 32, 64]
  assert candidates.round_sizes(4, 3, 20) == [12, 24, 48, 64]
  assert candidates.round_sizes(32, 3, 200) == [64]
  assert candidates.round_sizes(4, 1, 1) == [4]
  assert candidates.round_sizes(100, 1, 1) == [100]
