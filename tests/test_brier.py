import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax.objectives import brier

# A law over the patches of K = 4: (tokens, probability).
LAW = (((1, 2, 3, 4), 0.5), ((1, 2, 3, 5), 0.3), ((1, 9, 9, 9), 0.15), ((8, 8, 8, 8), 0.05))
PATCHES = np.array([tokens for tokens, _ in LAW])
PROBABILITY = np.array([p for _, p in LAW])


def exact_collision(n):
  grams, index = np.unique(PATCHES[:, :n], axis=0, return_inverse=True)
  mass = np.bincount(index.ravel(), PROBABILITY, len(grams))
  return float(np.sum(mass**2))


def draw(rng, *shape):
  return PATCHES[rng.choice(len(PATCHES), size=shape, p=PROBABILITY)]


def test_terms_by_hand():
  """x1 = abcd, x2 = abce, y = abce."""
  sample_NPK = jnp.array([[[1, 2, 3, 4]], [[1, 2, 3, 5]]])
  accuracy_Pn, collision_Pn = brier.accuracy_and_collision(sample_NPK, jnp.array([[1, 2, 3, 5]]))
  np.testing.assert_array_equal(accuracy_Pn, [[1, 1, 1, 0.5]])
  np.testing.assert_array_equal(collision_Pn, [[1, 1, 1, 0]])


def test_an_ngram_is_one_outcome_a_late_match_after_a_miss_does_not_count():
  sample_NPK = jnp.array([[[1, 7, 3, 4]], [[1, 6, 3, 4]]])
  accuracy_Pn, collision_Pn = brier.accuracy_and_collision(sample_NPK, jnp.array([[1, 2, 3, 4]]))
  np.testing.assert_array_equal(accuracy_Pn, [[1, 0, 0, 0]])
  np.testing.assert_array_equal(collision_Pn, [[1, 0, 0, 0]])


def test_a_calibrated_model_scores_the_exact_value_of_its_law():
  """Where x and y share one law, every Brier-n is its collision, known in closed form."""
  rng = np.random.default_rng(0)
  blocks, patches, samples = 40, 50, 8
  accuracy, collision = [], []
  for _ in range(blocks):
    a_Pn, c_Pn = brier.accuracy_and_collision(
      jnp.array(draw(rng, samples, patches)), jnp.array(draw(rng, patches))
    )
    accuracy.append(np.mean(a_Pn, axis=0))
    collision.append(np.mean(c_Pn, axis=0))
  found = brier.summary(np.stack(accuracy), np.stack(collision))
  exact = [exact_collision(n) for n in range(1, 5)]
  for n in range(1, 5):
    error = found[f"brier_{n}_stderr"]
    assert abs(found[f"brier_{n}"] - 100 * exact[n - 1]) < 3 * error
    assert 0 < error < 3
  assert abs(found["brier_lm"] - 100 * np.prod(exact) ** 0.25) < 3 * found["brier_lm_stderr"]


def test_more_samples_give_the_same_expectation_and_less_variance():
  rng = np.random.default_rng(1)
  target_PK = jnp.array(draw(rng, 4000))
  estimates = {
    count: np.asarray(
      brier.accuracy_and_collision(jnp.array(draw(rng, count, 4000)), target_PK)[1][:, 3]
    )
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
  accuracy_Pn, collision_Pn = brier.accuracy_and_collision(
    jnp.array(sample_NPK), jnp.array(target_PK)
  )
  np.testing.assert_array_equal(collision_Pn, np.ones((2000, 4)))
  assert abs(accuracy_Pn[:, 3].mean() - 0.5) < 0.05


def test_a_uniform_model_over_many_tokens_scores_about_zero():
  key_a, key_b = jax.random.split(jax.random.key(0))
  sample_NPK = jax.random.randint(key_a, (8, 500, 4), 0, 10_000)
  target_PK = jax.random.randint(key_b, (500, 4), 0, 10_000)
  accuracy_Pn, collision_Pn = brier.accuracy_and_collision(sample_NPK, target_PK)
  found = brier.summary(np.asarray(accuracy_Pn), np.asarray(collision_Pn))
  assert abs(found["brier_1"]) < 0.2
  assert found["brier_lm"] == 0.0


def test_two_negative_parts_do_not_make_a_positive_score():
  accuracy_n, collision_n = np.array([0.5, 0.5, 0.1, 0.1]), np.array([0.5, 0.5, 0.4, 0.4])
  assert brier.brier_lm(accuracy_n, collision_n) == 0.0


def test_one_sample_has_no_pair():
  with pytest.raises(ValueError, match="N >= 2"):
    brier.accuracy_and_collision(jnp.zeros((1, 2, 4), int), jnp.zeros((2, 4), int))


def test_fewer_than_four_tokens_a_patch_give_no_brier_lm():
  found = brier.summary(np.full((5, 2), 0.5), np.full((5, 2), 0.25))
  assert found["brier_2"] == 75.0
  assert "brier_lm" not in found


def test_jackknife_of_a_mean_is_its_standard_error():
  values = np.random.default_rng(3).normal(size=50)
  expected = values.std(ddof=1) / np.sqrt(50)
  assert brier.jackknife(values, lambda mean: mean) == pytest.approx(expected)


def test_marginal_score_of_a_known_law():
  rng = np.random.default_rng(4)
  found = brier.marginal(draw(rng, 200_000), draw(rng, 200_000))["brier_lm_marginal"]
  exact = [exact_collision(n) for n in range(1, 5)]
  assert found == pytest.approx(100 * np.prod(exact) ** 0.25, rel=0.02)


def test_marginal_gives_unseen_patches_no_probability():
  train_PK = np.array([[1, 2, 3, 4]] * 3 + [[1, 2, 3, 5]])
  heldout_PK = np.array([[1, 2, 3, 4], [7, 7, 7, 7]])
  # n <= 3: accuracy 1/2, collision 1; n = 4: accuracy 0.75/2, collision 10/16.
  parts = [2 * 0.5 - 1] * 3 + [0.75 - 0.625]
  found = brier.marginal(train_PK, heldout_PK)["brier_lm_marginal"]
  assert parts[0] == 0 and found == 0.0
