"""Claims about the optimizer: schedules by hand, decay of matrices only, the first Adam step."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import config
from calm_jax.training import optimizer


def rates(steps, **settings):
  rate = optimizer.schedule(config.Optimizer(learning_rate=1.0, **settings), steps)
  return np.array([float(rate(jnp.int32(step))) for step in range(steps)])


def test_warmup_rises_from_the_first_step_to_the_peak():
  np.testing.assert_allclose(rates(6, warmup_steps=4), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0], rtol=1e-6)


def test_the_constant_schedule_without_warmup_starts_at_the_peak():
  np.testing.assert_array_equal(rates(3, warmup_steps=0), [1, 1, 1])


def test_cosine_decays_from_the_peak_to_its_final_share():
  learning_rates = rates(102, schedule="cosine", warmup_steps=2, final_share=0.1)
  assert learning_rates[1] == 1.0
  assert learning_rates[52] == pytest.approx(0.55, abs=1e-6)
  assert learning_rates[-1] == pytest.approx(0.1, abs=1e-3)
  assert np.all(np.diff(learning_rates[2:]) < 0)


def test_warmup_stable_decay_is_constant_until_its_decay():
  learning_rates = rates(10, schedule="wsd", warmup_steps=2, decay_steps=4, final_share=0.0)
  np.testing.assert_allclose(learning_rates, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25], rtol=1e-6)


def test_biases_and_norms_are_not_decayed():
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,)), "scale": jnp.ones((2,))}
  tx = optimizer.transformation(config.Optimizer(weight_decay=0.1))
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zero, tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], 0.1, rtol=1e-6)
  assert not np.any(updates["bias"]) and not np.any(updates["scale"])


def test_first_adam_step_is_the_sign_of_the_gradient():
  params = {"bias": jnp.zeros((3,))}
  tx = optimizer.transformation(config.Optimizer(clip_norm=1e9))
  updates, _ = tx.update({"bias": jnp.array([2.0, -0.5, 1e-3])}, tx.init(params), params)
  np.testing.assert_allclose(updates["bias"], [1, -1, 1], rtol=1e-4)
