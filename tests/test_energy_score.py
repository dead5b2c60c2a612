import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax.objectives import energy_score


def hand_written(sample_NZ, target_MZ, alpha):
  """The sums of the paper's equation, one pair at a time."""
  n, m = len(sample_NZ), len(target_MZ)
  near = sum(np.linalg.norm(t - s) ** alpha for t in target_MZ for s in sample_NZ)
  apart = sum(
    np.linalg.norm(sample_NZ[i] - sample_NZ[j]) ** alpha
    for i in range(n)
    for j in range(n)
    if i != j
  )
  return 2 / (n * m) * near - apart / (n * (n - 1))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_loss_equals_the_sums_written_by_hand(alpha):
  rng = np.random.default_rng(0)
  sample_NBPZ = rng.normal(size=(3, 2, 2, 5))
  target_MBPZ = rng.normal(size=(4, 2, 2, 5))
  loss_BP = energy_score.energy_loss(jnp.array(sample_NBPZ), jnp.array(target_MBPZ), alpha)
  expected_BP = [
    [hand_written(sample_NBPZ[:, b, p], target_MBPZ[:, b, p], alpha) for p in range(2)]
    for b in range(2)
  ]
  np.testing.assert_allclose(loss_BP, expected_BP, rtol=1e-5)


def test_two_samples_on_a_line_by_head():
  """Samples 0 and 3, target 1: 2 · (1 + 2)/2 − 3 = 0."""
  sample_NBPZ = jnp.array([0.0, 3.0]).reshape(2, 1, 1, 1)
  target_MBPZ = jnp.array([1.0]).reshape(1, 1, 1, 1)
  assert float(energy_score.energy_loss(sample_NBPZ, target_MBPZ)[0, 0]) == 0.0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_gradient_is_finite_where_samples_coincide(alpha):
  """At step 0 the head's last layer is zero: all samples are the same point."""
  target_MBPZ = jnp.array([3.0, 4.0]).reshape(1, 1, 1, 2)
  sample_NBPZ = jnp.zeros((2, 1, 1, 2))
  grad = jax.grad(lambda s: energy_score.energy_loss(s, target_MBPZ, alpha).sum())(sample_NBPZ)
  # Only the attraction pulls: d/ds of 2 · mean ‖z − s‖^alpha, each of the two samples by half.
  expected_Z = -alpha * 5.0 ** (alpha - 2) * np.array([3.0, 4.0])
  np.testing.assert_allclose(grad[0, 0, 0], expected_Z, rtol=1e-5)
  np.testing.assert_allclose(grad[1, 0, 0], expected_Z, rtol=1e-5)


def test_gradient_is_zero_where_a_sample_meets_its_only_target():
  target_MBPZ = jnp.ones((1, 1, 1, 3))
  grad = jax.grad(lambda s: energy_score.attraction(s, target_MBPZ).sum())(jnp.ones((2, 1, 1, 3)))
  np.testing.assert_array_equal(grad, np.zeros((2, 1, 1, 3)))


def test_score_is_proper_the_true_law_beats_a_shifted_and_a_collapsed_one():
  key_a, key_b = jax.random.split(jax.random.key(0))
  target_MBPZ = jax.random.normal(key_a, (64, 200, 1, 4))
  true_NBPZ = jax.random.normal(key_b, (64, 200, 1, 4))
  losses = [
    float(jnp.mean(energy_score.energy_loss(sample, target_MBPZ)))
    for sample in (true_NBPZ, true_NBPZ + 0.5, 0.5 * true_NBPZ, 0 * true_NBPZ)
  ]
  assert losses[0] == min(losses)
  assert all(other > losses[0] + 0.01 for other in losses[1:])


def test_one_sample_is_refused():
  with pytest.raises(ValueError, match="N >= 2 samples, got 1"):
    energy_score.energy_loss(jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 1, 2)))


@pytest.mark.parametrize("alpha", [0.0, 2.1, -1.0])
def test_an_improper_exponent_is_refused(alpha):
  with pytest.raises(ValueError, match=r"\(0, 2\]"):
    energy_score.energy_loss(jnp.zeros((2, 1, 1, 2)), jnp.zeros((1, 1, 1, 2)), alpha)
