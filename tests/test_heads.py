"""Claims about every head of the table, and about flow and diffusion."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models.heads import diffusion as diffusion_head
from calm_jax.models.heads import flow, registry
from calm_jax.models.heads import head as head_lib
from calm_jax.objectives import diffusion, flow_matching

WIDTH, LATENT = 8, 3
TRUNK = head_lib.Trunk(WIDTH, LATENT, "fan_in")
STEPS = {"energy": 0, "flow": 4, "diffusion": 6}


def build(kind: str) -> head_lib.Head:
  sizes = config.Head(kind=kind, blocks=2, noise=3, steps=STEPS[kind])
  return registry.build(sizes, TRUNK)


def with_nonzero_layers(params):
  """Returns the parameters with no layer at its zero initial value."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(3), len(leaves))
  pairs = zip(leaves, keys, strict=True)
  return tree.unflatten([x + 0.3 * jax.random.normal(key, x.shape) for x, key in pairs])


@pytest.fixture(params=registry.HEADS)
def kind(request: pytest.FixtureRequest) -> str:
  return request.param


def test_samples_read_their_own_noise_and_hidden_state(kind: str):
  head = build(kind)
  params, hidden_PD = (
    with_nonzero_layers(head.init(jax.random.key(0))),
    jax.random.normal(jax.random.key(1), (5, WIDTH)),
  )
  noise = head.draw_noise(jax.random.key(2), (4, 5))
  assert noise.shape == (4, 5, *head.noise_shape)
  before = head.samples(params, head.condition(params, hidden_PD), noise)
  assert before.shape == (4, 5, LATENT)
  other = head.samples(params, head.condition(params, hidden_PD), noise.at[1, 3].add(0.1))
  changed = np.argwhere(np.any(np.asarray(before != other), axis=-1))
  np.testing.assert_array_equal(changed, [[1, 3]])
  other = head.samples(params, head.condition(params, hidden_PD.at[3].add(0.5)), noise)
  changed = np.argwhere(np.any(np.asarray(before != other), axis=-1))
  np.testing.assert_array_equal(changed, [[n, 3] for n in range(4)])


def test_a_key_decides_the_samples(kind: str):
  head = build(kind)
  params, hidden_PD = with_nonzero_layers(head.init(jax.random.key(0))), jnp.ones((5, WIDTH))
  a, b, c = (head.sample(params, hidden_PD, jax.random.key(seed), 4) for seed in (0, 0, 1))
  assert a.shape == (4, 5, LATENT)
  np.testing.assert_array_equal(a, b)
  assert np.abs(a - c).max() > 1e-3
  assert np.abs(a[0] - a[1]).max() > 1e-3


@pytest.mark.parametrize("kind", ["energy", "flow"])
def test_a_head_learns_a_distribution(kind: str):
  """From one hidden state, the mean and spread of a known posterior."""
  head = build(kind)
  settings = config.CalmLoss(samples=64, posterior_draws=64)
  params, hidden_1D = head.init(jax.random.key(0)), jnp.ones((1, WIDTH))
  mean_1Z, log_std_1Z = jnp.array([[1.0, -2.0, 0.5]]), jnp.log(jnp.array([[0.5, 0.3, 0.8]]))

  def loss(params, key):
    posterior = (mean_1Z, log_std_1Z)
    loss_1, _ = head.loss(params, hidden_1D, posterior, key, settings)
    return jnp.mean(loss_1)

  @jax.jit
  def step(carry, i):
    params, first, second = carry
    grads = jax.grad(loss)(params, jax.random.fold_in(jax.random.key(1), i))
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
    second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, grads)
    scale = 0.01 * jnp.minimum(1.0, 2 * (1 - i / 600))
    params = jax.tree.map(
      lambda p, m, v: p - scale * m / (jnp.sqrt(v) + 1e-6), params, first, second
    )
    return (params, first, second), None

  zeros = jax.tree.map(jnp.zeros_like, params)
  (params, _, _), _ = jax.lax.scan(step, (params, zeros, zeros), jnp.arange(600))
  sample_NZ = np.asarray(head.sample(params, hidden_1D, jax.random.key(9), 4000))[:, 0]
  np.testing.assert_allclose(sample_NZ.mean(axis=0), mean_1Z[0], atol=0.15)
  np.testing.assert_allclose(sample_NZ.std(axis=0), np.exp(log_std_1Z[0]), rtol=0.35)


class Optimal:
  """The optimal prediction of the noise in latents of N(mean, std²), with the least variance."""

  def __init__(self, mean_Z, std_Z):
    self.mean_Z, self.std_Z = mean_Z, std_Z

  def apply(self, variables, *args, method):
    if method == "condition":
      return args[0]
    x_NZ, _, time_N = args
    signal_N1 = jnp.asarray(diffusion.cosine_alphas_cumprod(), jnp.float32)[time_N][..., None]
    mean_NZ = jnp.sqrt(signal_N1) * self.mean_Z[None, None]
    variance_NZ = signal_N1 * self.std_Z[None, None] ** 2 + 1 - signal_N1
    noise_NZ = jnp.sqrt(1 - signal_N1) * (x_NZ - mean_NZ) / variance_NZ
    return jnp.concatenate([noise_NZ, -jnp.ones_like(x_NZ)], axis=-1)


def test_the_diffusion_sampler_with_an_optimal_network_draws_the_right_distribution():
  """A trained network of this size is too rough: the first published step magnifies by 300."""
  mean_Z, std_Z = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.5, 0.3, 0.8])
  sizes = config.Head(kind="diffusion", blocks=1)
  head = diffusion_head.DiffusionHead(sizes, TRUNK)
  head.network = Optimal(mean_Z, std_Z)
  sample_NZ = np.asarray(head.sample({}, jnp.ones((1, WIDTH)), jax.random.key(9), 4000))[:, 0]
  np.testing.assert_allclose(sample_NZ.mean(axis=0), mean_Z, atol=0.05)
  np.testing.assert_allclose(sample_NZ.std(axis=0), std_Z, rtol=0.1)


def test_an_untrained_flow_head_returns_its_noise():
  head = build("flow")
  noise = head.draw_noise(jax.random.key(2), (4,))
  params = head.init(jax.random.key(0))
  condition_D = head.condition(params, jnp.ones(8))
  np.testing.assert_array_equal(head.samples(params, condition_D, noise), noise)


def test_flow_times_are_whole_thousandths():
  np.testing.assert_array_equal(flow.network_time(jnp.array([0.0, 0.0015, 0.9999])), [0, 1, 999])


def test_flow_loss_of_the_right_velocity_is_zero():
  start_NZ, z_NZ = jax.random.normal(jax.random.key(0), (2, 4, 3))
  np.testing.assert_array_equal(
    flow_matching.flow_matching_loss(z_NZ - start_NZ, start_NZ, z_NZ), 0
  )
  t_N = jnp.array([0.0, 1.0, 0.5, 0.25])
  x_NZ = flow_matching.between(t_N, start_NZ, z_NZ)
  np.testing.assert_allclose(x_NZ[0], start_NZ[0])
  np.testing.assert_allclose(x_NZ[1], z_NZ[1])
  np.testing.assert_allclose(x_NZ[3], 0.75 * start_NZ[3] + 0.25 * z_NZ[3], rtol=1e-6)


def test_levels_are_evenly_spaced_from_the_first_to_the_last():
  levels = diffusion.Levels.evenly(100)
  assert levels.time_T[[0, 1, 98, 99]].tolist() == [0, 10, 989, 999]
  assert len(set(np.diff(levels.time_T))) == 2


def test_a_step_of_the_true_noise_has_the_posteriors_mean():
  """q(x_{t-1} | x_t, z) by Gaussian algebra, for the respaced levels."""
  levels = diffusion.Levels.evenly(10)
  z_NZ, noise_NZ = jax.random.normal(jax.random.key(0), (2, 1, 3))
  level, now, before = 4, *levels.alphas_cumprod_T[[4, 3]]
  x_NZ = diffusion.noised(levels, z_NZ, jnp.array([level]), noise_NZ)
  prediction = jnp.concatenate([noise_NZ, -jnp.ones((1, 3))], axis=-1)
  mean_NZ, log_variance_NZ = diffusion.step_law(levels, x_NZ, prediction, jnp.array([level]))
  alpha = now / before
  precision = alpha / (1 - alpha) + 1 / (1 - before)
  weighted = np.sqrt(alpha) / (1 - alpha) * x_NZ + np.sqrt(before) / (1 - before) * z_NZ
  np.testing.assert_allclose(mean_NZ, weighted / precision, rtol=2e-4, atol=1e-5)
  np.testing.assert_allclose(np.exp(log_variance_NZ), 1 / precision, rtol=1e-4)


def test_the_variational_term_trains_only_the_variance():
  levels = diffusion.Levels.evenly(diffusion.LEVELS)
  z_NZ, noise_NZ = jax.random.normal(jax.random.key(0), (2, 5, 3))
  level_N = jnp.array([0, 1, 10, 500, 999])
  x_NZ = diffusion.noised(levels, z_NZ, level_N, noise_NZ)

  def term(prediction):
    return jnp.sum(diffusion.variational_term(levels, prediction, z_NZ, x_NZ, level_N))

  grad = jax.grad(term)(jnp.concatenate([0.9 * noise_NZ, jnp.zeros((5, 3))], axis=-1))
  np.testing.assert_array_equal(grad[:, :3], 0)
  assert np.all(np.abs(grad[:, 3:]).max(axis=1) > 0)


def test_the_variational_term_at_level_zero_is_the_probability_of_a_bin():
  """For a latent in (−1, 1): the mass of a normal distribution within 1/255 of the latent."""
  levels = diffusion.Levels.evenly(diffusion.LEVELS)
  z_NZ, level_N = jnp.array([[0.3]]), jnp.array([0])
  x_NZ = diffusion.noised(levels, z_NZ, level_N, jnp.zeros((1, 1)))
  bits_N = diffusion.variational_term(levels, jnp.zeros((1, 2)), z_NZ, x_NZ, level_N)
  mean_NZ, log_variance_NZ = diffusion.step_law(levels, x_NZ, jnp.zeros((1, 2)), level_N)
  std = float(np.exp(log_variance_NZ[0, 0] / 2))
  edges = (np.array([0.3 + 1 / 255, 0.3 - 1 / 255]) - float(mean_NZ[0, 0])) / std
  up_to, from_ = (float(jax.scipy.stats.norm.cdf(edge)) for edge in edges)
  np.testing.assert_allclose(bits_N, [-np.log2(up_to - from_)], rtol=2e-3)
