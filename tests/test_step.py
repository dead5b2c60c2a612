"""Claims about a train step: accumulation, the update, skipped steps and signals."""

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax import config
from calm_jax.training import step

SETTINGS = config.Optimizer(learning_rate=0.1, warmup_steps=0, weight_decay=0.0)


def loss(params, frozen, batch, key):
  """Returns the mean of w·x over the unmasked entries, whose number may differ between parts."""
  tokens = jnp.sum(batch["counts"])
  value = jnp.sum(batch["x"] * batch["counts"] * params["w"]) / tokens
  return value, {"tokens": tokens, "twice": 2 * value}


def batch():
  return {
    "x": jnp.array([1.0, 2.0, 3.0, 4.0]),
    "counts": jnp.array([1.0, 0.0, 1.0, 1.0]),
    "index": jnp.arange(4),
  }


def test_accumulation_weighs_parts_by_their_tokens():
  params = {"w": jnp.float32(5.0)}
  for parts in (1, 2):
    grads, metrics = step.accumulated_gradients(loss, params, {}, batch(), jax.random.key(0), parts)
    np.testing.assert_allclose(grads["w"], 8 / 3, rtol=1e-6)  # A mean of means would be 2.25.
    np.testing.assert_allclose(metrics["loss"], 40 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["twice"], 80 / 3, rtol=1e-6)
    assert metrics["tokens"] == 3


def test_the_first_step_has_the_size_of_the_learning_rate():
  state = step.new_state({"w": jnp.float32(5.0)}, SETTINGS)
  state, metrics = step.make_step(loss, SETTINGS, config.Training(steps=10))(state, {}, batch())
  np.testing.assert_allclose(state.params["w"], 4.9, rtol=1e-6)
  np.testing.assert_allclose(metrics["learning_rate"], 0.1, rtol=1e-6)
  np.testing.assert_allclose(metrics["update_norm"], 0.1, rtol=1e-5)
  assert metrics["finite"] and int(state.step) == 1 and int(state.skipped) == 0


def test_a_non_finite_step_changes_nothing_but_the_counters():
  state = step.new_state({"w": jnp.float32(5.0)}, SETTINGS)
  take_step = step.make_step(loss, SETTINGS, config.Training(steps=10))
  state, _ = take_step(state, {}, batch())
  for bad in (jnp.nan, jnp.inf):
    before = state
    state, metrics = take_step(state, {}, batch() | {"x": jnp.full((4,), bad)})
    assert not metrics["finite"]
    jax.tree.map(
      np.testing.assert_array_equal,
      (state.params, state.optimizer),
      (before.params, before.optimizer),
    )
  assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (3, 2, 2)
  state, _ = take_step(state, {}, batch())
  assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (4, 2, 0)


def test_a_void_step_leaves_the_state_unchanged():
  take_step = step.with_signals(step.make_step(loss, SETTINGS, config.Training(steps=10)))
  before = step.new_state({"w": jnp.float32(5.0)}, SETTINGS)
  after, metrics = take_step(before, {}, batch(), jnp.array([[0, 0, 0], [0, 0, 1]]))
  jax.tree.map(np.testing.assert_array_equal, after, before)
  assert [int(metrics[name]) for name in step.SIGNALS] == [0, 0, 1]


def test_a_signal_of_any_device_is_returned_and_does_not_change_the_step():
  plain = step.make_step(loss, SETTINGS, config.Training(steps=10))
  before = step.new_state({"w": jnp.float32(5.0)}, SETTINGS)
  expected, _ = plain(before, {}, batch())
  after, metrics = step.with_signals(plain)(before, {}, batch(), jnp.array([[1, 0, 0], [0, 1, 0]]))
  jax.tree.map(np.testing.assert_array_equal, after, expected)
  assert [int(metrics[name]) for name in step.SIGNALS] == [1, 1, 0]
