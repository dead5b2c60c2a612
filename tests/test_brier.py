"""Claims about BrierLM: its terms by hand, its expectation, its standard error, its chain."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax.objectives import brier

# A distribution over patches of K = 4: (tokens, probability).
LAW = (((1, 2, 3, 4), 0.5), ((1, 2, 3, 5), 0.3), ((1, 9, 9, 9), 0.15), ((8, 8, 8, 8), 0.05))
PATCHES = np.array([tokens for tokens, _ in LAW])
PROBABILITY = np.array([p for _, p in LAW])


def scores(sample_NPK, target_PK):
  return brier.accuracy(sample_NPK, target_PK), brier.collision(sample_NPK)


def exact_collision(n):
  grams, index = np.unique(PATCHES[:, :n], axis=0, return_inverse=True)
  mass = np.bincount(index.ravel(), PROBABILITY, len(grams))
  return float(np.sum(mass**2))


def draw(rng, *shape):
  return PATCHES[rng.choice(len(PATCHES), size=shape, p=PROBABILITY)]


def test_terms_by_hand():
  """x1 = abcd, x2 = abce, y = abce."""
  sample_NPK = jnp.array([[[1, 2, 3, 4]], [[1, 2, 3, 5]]])
  accuracy_Pn, collision_Pn = scores(sample_NPK, jnp.array([[1, 2, 3, 5]]))
  np.testing.assert_array_equal(accuracy_Pn, [[1, 1, 1, 0.5]])
  np.testing.assert_array_equal(collision_Pn, [[1, 1, 1, 0]])


def test_a_match_after_a_miss_does_not_count():
  sample_NPK = jnp.array([[[1, 7, 3, 4]], [[1, 6, 3, 4]]])
  accuracy_Pn, collision_Pn = scores(sample_NPK, jnp.array([[1, 2, 3, 4]]))
  np.testing.assert_array_equal(accuracy_Pn, [[1, 0, 0, 0]])
  np.testing.assert_array_equal(collision_Pn, [[1, 0, 0, 0]])


def test_a_calibrated_model_scores_the_exact_value_of_its_distribution():
  """If x and y have one distribution, every Brier-n is its collision, known in closed form."""
  rng = np.random.default_rng(0)
  blocks, patches, samples = 40, 50, 8
  accuracy, collision = [], []
  for _ in range(blocks):
    a_Pn, c_Pn = scores(jnp.array(draw(rng, samples, patches)), jnp.array(draw(rng, patches)))
    accuracy.append(np.mean(a_Pn, axis=0))
    collision.append(np.mean(c_Pn, axis=0))
  result = brier.summary(np.stack(accuracy), np.stack(collision))
  exact = [exact_collision(n) for n in range(1, 5)]
  for n in range(1, 5):
    error = result[f"brier_{n}_stderr"]
    assert abs(result[f"brier_{n}"] - 100 * exact[n - 1]) < 3 * error
    assert 0 < error < 3
  assert abs(result["brier_lm"] - 100 * np.prod(exact) ** 0.25) < 3 * result["brier_lm_stderr"]


def test_more_samples_give_the_same_expectation_and_less_variance():
  rng = np.random.default_rng(1)
  target_PK = jnp.array(draw(rng, 4000))
  estimates = {
    count: np.asarray(scores(jnp.array(draw(rng, count, 4000)), target_PK)[1][:, 3])
    for count in (2, 16)
  }
  exact = exact_collision(4)
  for values in estimates.values():
    assert abs(values.mean() - exact) < 3 * values.std() / np.sqrt(len(values)) + 1e-9
  assert estimates[16].var() < estimates[2].var() / 4


def test_a_collapsed_model_shows_collision_above_accuracy():
  rng = np.random.default_rng(2)
  target_PK = draw(rng, 2000)
  sample_NPK = np.broadcast_to(PATCHES[0], (4, 2000, 4))
  accuracy_Pn, collision_Pn = scores(jnp.array(sample_NPK), jnp.array(target_PK))
  np.testing.assert_array_equal(collision_Pn, np.ones((2000, 4)))
  assert abs(accuracy_Pn[:, 3].mean() - 0.5) < 0.05


def test_a_uniform_model_over_many_tokens_scores_about_zero():
  key_a, key_b = jax.random.split(jax.random.key(0))
  sample_NPK = jax.random.randint(key_a, (8, 500, 4), 0, 10_000)
  target_PK = jax.random.randint(key_b, (500, 4), 0, 10_000)
  accuracy_Pn, collision_Pn = scores(sample_NPK, target_PK)
  result = brier.summary(np.asarray(accuracy_Pn), np.asarray(collision_Pn))
  assert abs(result["brier_1"]) < 0.2
  assert result["brier_lm"] == 0.0


def test_two_negative_parts_do_not_make_a_positive_score():
  accuracy_n, collision_n = np.array([0.5, 0.5, 0.1, 0.1]), np.array([0.5, 0.5, 0.4, 0.4])
  assert brier.brier_lm(accuracy_n, collision_n) == 0.0


def test_one_sample_is_refused():
  with pytest.raises(ValueError, match="N >= 2"):
    scores(jnp.zeros((1, 2, 4), int), jnp.zeros((2, 4), int))


def test_jackknife_of_a_mean_is_its_standard_error():
  values = np.random.default_rng(3).normal(size=50)
  expected = values.std(ddof=1) / np.sqrt(50)
  assert brier.jackknife(values, lambda mean: mean) == pytest.approx(expected)


def test_marginal_score_of_a_known_distribution():
  rng = np.random.default_rng(4)
  score = brier.marginal(draw(rng, 200_000), draw(rng, 200_000))["brier_lm_marginal"]
  exact = [exact_collision(n) for n in range(1, 5)]
  assert score == pytest.approx(100 * np.prod(exact) ** 0.25, rel=0.02)


def test_marginal_gives_unseen_patches_no_probability():
  train_PK = np.array([[1, 2, 3, 4]] * 3 + [[1, 2, 3, 5]])
  heldout_PK = np.array([[1, 2, 3, 4], [7, 7, 7, 7]])
  # n <= 3: accuracy 1/2, collision 1; n = 4: accuracy 0.75/2, collision 10/16.
  parts = [2 * 0.5 - 1] * 3 + [0.75 - 0.625]
  score = brier.marginal(train_PK, heldout_PK)["brier_lm_marginal"]
  assert parts[0] == 0 and score == 0.0


CHAIN = np.array([[0.6, 0.4], [0.2, 0.8]])  # P(next token | token), for two tokens.


def follow(rng: np.random.Generator, token: np.ndarray) -> np.ndarray:
  """Returns a token drawn after each given token."""
  return (rng.random(token.shape) < CHAIN[token, 1]).astype(int)


def chain_collision(token: int, n: int) -> float:
  """Returns the probability that two continuations of n tokens are equal."""
  shares = CHAIN[token] ** 2
  if n == 1:
    return shares.sum()
  return sum(shares[x] * chain_collision(x, n - 1) for x in (0, 1))


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_short_patches_chain_into_n_grams_of_the_right_expectation(patch_size: int):
  """A Markov chain with known probabilities: scores of patches against exact sums."""
  rng, count, samples = np.random.default_rng(5), 60_000, 3

  def patch_after(token):
    patch = []
    for _ in range(patch_size):
      patch.append(token := follow(rng, token))
    return np.stack(patch, axis=-1)

  start_P = rng.integers(0, 2, count)
  text, within_a, whole_a, within_c, whole_c = [], [], [], [], []
  before_P = path_P = start_P
  for _ in range(brier.patches_spanned(patch_size)):
    text.append(patch_after(before_P))
    forced_NPK = patch_after(np.broadcast_to(before_P, (samples, count)))
    right_PK = brier.accuracy(jnp.array(forced_NPK), jnp.array(text[-1]))
    sample_NPK = jnp.array(patch_after(np.broadcast_to(path_P, (samples, count))))
    within_a.append(right_PK)
    whole_a.append(right_PK[:, -1])
    within_c.append(brier.collision(sample_NPK))
    whole_c.append(brier.repeats(sample_NPK))
    before_P, path_P = text[-1][:, -1], np.asarray(sample_NPK[0, :, -1])
  accuracy_n = np.asarray(brier.chain(within_a, whole_a[:-1])).mean(axis=0)
  collision_n = np.asarray(brier.chain(within_c, whole_c[:-1])).mean(axis=0)
  exact = [np.mean([chain_collision(x, n) for x in (0, 1)]) for n in range(1, 5)]
  # The text is drawn from the chain itself: accuracy and collision have one expectation.
  np.testing.assert_allclose(accuracy_n, exact, atol=0.006)
  np.testing.assert_allclose(collision_n, exact, atol=0.006)


def test_grams_start_where_patches_do():
  token_S = np.arange(9)
  np.testing.assert_array_equal(brier.grams(token_S, 4), [[0, 1, 2, 3], [4, 5, 6, 7]])
  expected = [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
  np.testing.assert_array_equal(brier.grams(token_S, 2), expected)
  assert brier.grams(np.arange(12).reshape(2, 6), 1).shape == (2, 3, 4)


def test_the_expected_terms_are_those_of_tokens_drawn_from_the_softmax():
  """A candidate that occurs twice counts once; a target that is none is never right."""
  rng = np.random.default_rng(0)
  candidate_KU = jnp.array([[3, 5, 3, 9], [1, 2, 4, 2]])
  logit_NPKU = rng.normal(size=(2, 3, 2, 4)).astype(np.float32)
  logit_NPKU[..., 0, 2], logit_NPKU[..., 1, 3] = logit_NPKU[..., 0, 0], logit_NPKU[..., 1, 1]
  target_PK = jnp.array([[3, 2], [9, 1], [5, 7]])
  accuracy_PK, collision_PK = brier.expected(jnp.array(logit_NPKU), candidate_KU, target_PK)
  odds_NPKX = np.exp(logit_NPKU[..., :3])
  odds_NPKX[..., 0, 2] = np.exp(logit_NPKU[..., 0, 3])  # The tokens are 3, 5, 9 and 1, 2, 4.
  share_NPKX = odds_NPKX / odds_NPKX.sum(-1, keepdims=True)
  right_PK = np.array([[0, 1], [2, 0], [1, -1]])
  for p, (first, second) in enumerate(right_PK):
    one_N = share_NPKX[:, p, 0, first]
    both_N = one_N * (share_NPKX[:, p, 1, second] if second >= 0 else 0)
    np.testing.assert_allclose(accuracy_PK[p], [one_N.mean(), both_N.mean()], rtol=1e-5)
  equal_PK = np.cumprod((share_NPKX[0] * share_NPKX[1]).sum(-1), axis=-1)
  np.testing.assert_allclose(collision_PK, equal_PK, rtol=1e-5)


def test_the_expected_terms_of_certain_samples_are_those_of_their_tokens():
  rng = np.random.default_rng(1)
  sample_NPK, target_PK = draw(rng, 8, 20), draw(rng, 20)
  candidate_KU = jnp.array(PATCHES.T)
  logit_NPKU = 100.0 * (sample_NPK[..., None] == PATCHES.T)
  expected = brier.expected(jnp.array(logit_NPKU), candidate_KU, jnp.array(target_PK))
  for got, wanted in zip(
    expected, scores(jnp.array(sample_NPK), jnp.array(target_PK)), strict=True
  ):
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_the_expected_collision_needs_two_samples():
  with pytest.raises(ValueError, match="N >= 2 samples, got 1"):
    brier.expected(jnp.zeros((1, 1, 2, 3)), jnp.zeros((2, 3), jnp.int32), jnp.zeros((1, 2)))
