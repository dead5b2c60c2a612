"""Claims about the energy head: its initial samples, what each sample reads, its two matrices."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import config, errors
from calm_jax.models import layers
from calm_jax.models.heads import energy, registry
from calm_jax.models.heads import head as head_lib

SIZES = config.Head(blocks=2, noise=3)
WIDTH, LATENT = 8, 5


@pytest.fixture(scope="module")
def head():
  return registry.build(SIZES, head_lib.Trunk(WIDTH, LATENT, "fan_in"))


@pytest.fixture(scope="module")
def params(head):
  return head.init(jax.random.key(0))


@pytest.fixture(scope="module")
def inputs():
  noise_key, hidden_key = jax.random.split(jax.random.key(1))
  noise_NBPR = jax.random.uniform(noise_key, (4, 2, 6, 3), minval=-0.5, maxval=0.5)
  return jax.random.normal(hidden_key, (2, 6, WIDTH)), noise_NBPR


def with_nonzero_output(params):
  """Returns the parameters with a last layer that is not zero."""
  kernel = jax.random.normal(jax.random.key(2), params["out"]["kernel"].shape)
  return {**params, "out": {**params["out"], "kernel": kernel}}


def samples(head, params, hidden_BPD, noise_NBPR):
  return head.samples(params, head.condition(params, hidden_BPD), noise_NBPR)


def test_at_the_start_every_sample_is_zero(head, params, inputs):
  sample_NBPZ = samples(head, params, *inputs)
  assert sample_NBPZ.shape == (4, 2, 6, LATENT)
  np.testing.assert_array_equal(sample_NBPZ, 0)


def test_a_sample_reads_its_own_noise_and_its_own_hidden_state(head, params, inputs):
  hidden_BPD, noise_NBPR = inputs
  before = samples(head, with_nonzero_output(params), hidden_BPD, noise_NBPR)
  other_noise = samples(
    head, with_nonzero_output(params), hidden_BPD, noise_NBPR.at[1, 0, 3].add(0.2)
  )
  changed = np.argwhere(np.any(np.asarray(before != other_noise), axis=-1))
  np.testing.assert_array_equal(changed, [[1, 0, 3]])
  other_hidden = samples(
    head, with_nonzero_output(params), hidden_BPD.at[0, 3].multiply(-1), noise_NBPR
  )
  changed = np.argwhere(np.any(np.asarray(before != other_hidden), axis=-1))
  np.testing.assert_array_equal(changed, [[n, 0, 3] for n in range(4)])


def both_halves(block, x_ND, y_D):
  return block(x_ND, block.condition(y_D))


def test_two_matrices_equal_one_matrix_on_concatenated_inputs(inputs):
  """The paper's first Linear reads [LayerNorm(x), y]."""
  block = energy.Block(WIDTH, "fan_in", jnp.float32)
  y_D, (x_ND,) = inputs[0][0, 0], jax.random.normal(jax.random.key(3), (1, 4, WIDTH))
  params = block.init(jax.random.key(4), x_ND, y_D, method=both_halves)["params"]
  result_ND = layers.apply(block, params, x_ND, y_D, method=both_halves)

  norm = nn.LayerNorm(epsilon=1e-6).apply({"params": params["norm"]}, x_ND)
  kernel = np.concatenate([params["sample_in"]["kernel"], params["hidden_in"]["kernel"]])
  both = np.concatenate([norm, np.broadcast_to(y_D, norm.shape)], axis=-1)

  def linear(name, x):
    return x @ params[name]["kernel"] + params[name]["bias"][None]

  u = nn.silu(linear("middle", nn.silu(both @ kernel + params["hidden_in"]["bias"][None])))
  gate, up = jnp.split(linear("gate_up", u), 2, axis=-1)
  np.testing.assert_allclose(result_ND, x_ND + linear("down", nn.silu(gate) * up), atol=1e-5)


def test_noise_is_uniform_around_zero(head):
  noise = np.asarray(head.draw_noise(jax.random.key(0), (1000,)))
  assert noise.shape == (1000, 3)
  assert -0.5 <= noise.min() < -0.49 and 0.49 < noise.max() < 0.5
  assert abs(noise.mean()) < 3 * np.sqrt(1 / 12 / noise.size)


def test_an_unknown_head_is_refused():
  with pytest.raises(errors.CalmError, match="did you mean 'energy'"):
    registry.build(config.Head(kind="enrgy"), head_lib.Trunk(WIDTH, LATENT, "fan_in"))
