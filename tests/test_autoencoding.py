"""Claims about stage one's objective: KL divergences, their floor, dropout."""

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax.objectives import autoencoding


def test_kl_equals_the_closed_form_by_hand():
  """mean 1, std e^0.5: 0.5 · (1 + e − 1 − 1)."""
  kl = autoencoding.kl_to_standard_normal(jnp.float32(1.0), jnp.float32(0.5))
  np.testing.assert_allclose(kl, 0.5 * (np.e - 1), rtol=1e-6)


def test_kl_equals_an_integral():
  mean, std = 0.7, 0.3
  x = np.linspace(-12, 12, 400_001)
  p = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
  log_p = -0.5 * ((x - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))
  log_q = -0.5 * x**2 - 0.5 * np.log(2 * np.pi)
  expected = np.sum(p * (log_p - log_q)) * (x[1] - x[0])
  kl = autoencoding.kl_to_standard_normal(jnp.float32(mean), jnp.float32(np.log(std)))
  np.testing.assert_allclose(kl, expected, rtol=1e-4)


def test_floored_kl_counts_the_floor_and_has_no_gradient_below_it():
  mean_Z, log_std_Z = jnp.array([0.1, 3.0]), jnp.array([0.0, 0.0])
  value, grad_Z = jax.value_and_grad(
    lambda mean_Z: autoencoding.floored_kl(mean_Z, log_std_Z, 0.5)
  )(mean_Z)
  np.testing.assert_allclose(value, 0.5 + 4.5, rtol=1e-6)
  np.testing.assert_allclose(grad_Z, [0.0, 3.0], rtol=1e-6)


def test_drop_tokens_replaces_the_stated_share():
  token = jnp.full((200, 200), 7)
  dropped = np.asarray(autoencoding.drop_tokens(jax.random.key(0), token, 0.15, 3))
  assert set(np.unique(dropped)) == {3, 7}
  assert abs(np.mean(dropped == 3) - 0.15) < 3 * np.sqrt(0.15 * 0.85 / token.size)


def test_drop_latents_keeps_the_mean():
  z_Z = jnp.ones((200, 200))
  dropped = np.asarray(autoencoding.drop_latents(jax.random.key(0), z_Z, 0.15))
  np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.85], rtol=1e-6)
  assert abs(dropped.mean() - 1) < 0.01
