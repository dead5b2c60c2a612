"""Samples of a known distribution at low temperatures, compared with the exact distribution."""

from typing import Any

import jax
import numpy as np
import optax
import scipy.special
import scipy.stats
from jax import numpy as jnp

from calm_jax import config
from calm_jax.generation import candidates, choosers, rules
from calm_jax.models.heads import head, registry, tempered

LAW, LAW_DRAWS = np.array([0.5, 0.3, 0.15, 0.05]), 100_000
# The tempered head: its width, the dimensions of its latents, its training, and its draws a race.
WIDTH, LATENT, STEPS, ROWS, POOL = 64, 8, 1000, 256, 64


def _batch_law(power: float, draws: int) -> np.ndarray:
  """Returns the batch rule's distribution on LAW, summed over all counts of `draws` draws."""
  grid = np.indices((draws + 1,) * (len(LAW) - 1)).reshape(len(LAW) - 1, -1).T
  grid = grid[grid.sum(axis=1) <= draws]
  count_CX = np.concatenate([grid, draws - grid.sum(axis=1, keepdims=True)], axis=1)
  gammaln = scipy.special.gammaln
  log_ways_C = gammaln(draws + 1) + (count_CX * np.log(LAW) - gammaln(count_CX + 1)).sum(axis=1)
  level_C1 = (power - np.maximum(int(power) - count_CX.max(axis=1), 0))[:, None]
  is_eligible_CX = count_CX >= np.maximum(np.floor(level_C1), 1)
  safe_CX = np.where(is_eligible_CX, count_CX, np.ceil(level_C1))
  weight_CX = np.exp(gammaln(safe_CX + 1) - gammaln(safe_CX - level_C1 + 1)) * is_eligible_CX
  share_CX = weight_CX / weight_CX.sum(axis=1, keepdims=True)
  return (np.exp(log_ways_C)[:, None] * share_CX).sum(axis=0)


def _tempered(power: float) -> np.ndarray:
  """Returns LAW at temperature 1 / power."""
  return LAW**power / (LAW**power).sum()


def batch_bias() -> tuple[list[str], Any]:
  """Measures the total variation between the batch rule's distribution and the exact one."""
  figures = [
    {
      "temperature": value,
      "num_candidates": n,
      "total_variation": float(abs(_batch_law(1 / value, n) - _tempered(1 / value)).sum() / 2),
    }
    for value in (0.7, 0.5, 0.4)
    for n in (10, 50, 200)
  ]
  biases = (
    f"{row['total_variation']:.4f} at T = {row['temperature']}, N = {row['num_candidates']}"
    for row in figures
  )
  line = "batch rule on a known law, total variation from the exact one: "
  return [line + ", ".join(biases)], figures


def _outcomes(rule: rules.Rule, temperatures: tuple[float, ...]) -> dict[float, np.ndarray]:
  """Returns, per temperature, how often a rule draws each outcome of LAW."""
  rows = 1000

  def draw_of(key_B):
    def draw(row_S, number_S):
      key_S = candidates.keys_of(key_B[row_S], candidates.DRAW, number_S)
      x_S = jax.vmap(lambda key: jax.random.categorical(key, jnp.log(LAW)))(key_S)
      return candidates.Candidate(x_S[:, None].astype(jnp.int32), None)

    return draw

  @jax.jit
  def outcomes(key, power):
    ones_B = jnp.ones(rows, jnp.int32)
    key_B = jax.random.split(key, rows)
    wanted = candidates.Wanted(
      key_B,
      power * ones_B,
      1.0 * ones_B,
      300 * ones_B,
      300 * ones_B,
      0 * ones_B[:, None],
      0 * ones_B,
      ones_B > 0,
    )
    choice = candidates.choose(wanted, draw_of(key_B), rule, choosers.batch, 300, [rows, 2 * rows])
    return choice.patch.token_K[:, 0]

  counts = {}
  for value in temperatures:
    batches = [outcomes(jax.random.key(i), 1 / value) for i in range(LAW_DRAWS // rows)]
    counts[value] = np.bincount(np.concatenate(batches), minlength=len(LAW))
  return counts


def first_bias() -> tuple[list[str], Any]:
  """Measures the total variation between rule `first`'s distribution and the exact one."""
  figures = {
    f"{value:.3g}": float(abs(count_X / count_X.sum() - _tempered(1 / value)).sum() / 2)
    for value, count_X in _outcomes(rules.first, (1 / 2, 1 / 3)).items()
  }
  biases = (f"{bias:.4f} at T = {value}" for value, bias in figures.items())
  return [f"first on that law: {', '.join(biases)}"], figures


def exact_law() -> tuple[list[str], Any]:
  """Tests the draws of rule `exact` against the exact distribution: p-values of chi-square."""
  figures = {
    f"{value:.3g}": float(
      scipy.stats.chisquare(count_X, _tempered(1 / value) * count_X.sum()).pvalue
    )
    for value, count_X in _outcomes(rules.exact, (1.0, 0.7, 0.5, 1 / 3)).items()
  }
  values = (f"p = {p:.3f} at T = {value}" for value, p in figures.items())
  line = f"exact on that law, chi-square over {LAW_DRAWS:,} draws: {', '.join(values)}"
  return [line], figures


def tempered_head() -> tuple[list[str], Any]:
  """Trains a tempered head on winners of `exact` and measures the total variation of one draw.

  Each outcome of LAW has a random latent. A draw counts as the outcome with the nearest latent.
  """
  trunk = head.Trunk(WIDTH, LATENT, "fan_in")
  model = tempered.Tempered(registry.build(config.Head(blocks=2, noise=16), trunk), trunk)
  latent_XZ = 3 * jax.random.normal(jax.random.key(0), (len(LAW), LATENT))
  optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))
  settings = config.CalmLoss(samples=8, posterior_draws=1)
  hidden_BD = jnp.zeros((ROWS, WIDTH))  # The context is always the same.

  def step(state, key):
    params, optimizer_state = state
    power_key, pool_key, race_key, loss_key = jax.random.split(key, 4)
    power_B = 4 ** jax.random.uniform(power_key, (ROWS,))
    pool_BN = jax.random.categorical(pool_key, jnp.log(LAW), shape=(ROWS, POOL))
    key_B = jax.random.split(race_key, ROWS)
    race = rules.exact, choosers.batch, POOL
    choice = candidates.choose_from(pool_BN[..., None].astype(jnp.int32), power_B, key_B, *race)
    target_BZ = latent_XZ[choice.patch.token_K[:, 0]]

    def loss(params):
      posterior = target_BZ, jnp.full_like(target_BZ, -jnp.inf)  # The std is 0.
      return jnp.mean(model.loss(params, hidden_BD, power_B, posterior, loss_key, settings)[0])

    updates, optimizer_state = optimizer.update(jax.grad(loss)(params), optimizer_state)
    return (optax.apply_updates(params, updates), optimizer_state), None

  @jax.jit
  def trained(key):
    params = model.initial(key)
    keys = jax.random.split(key, STEPS)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

  @jax.jit
  def outcomes(params, power_1, key):
    draw_N1Z = model.sample(params, hidden_BD[:1], power_1, key, LAW_DRAWS)
    return jnp.argmin(jnp.sum((draw_N1Z - latent_XZ[None]) ** 2, axis=-1), axis=-1)

  params, figures = trained(jax.random.key(1)), {}
  for value in (1 / 2, 1 / 3):
    x_N = outcomes(params, jnp.full((1,), 1 / value), jax.random.key(2))
    law_X = np.bincount(x_N, minlength=len(LAW)) / LAW_DRAWS
    figures[f"{value:.3g}"] = float(abs(law_X - _tempered(1 / value)).sum() / 2)
  biases = (f"{bias:.4f} at T = {value}" for value, bias in figures.items())
  return [f"one draw of a tempered head on that law: {', '.join(biases)}"], figures
