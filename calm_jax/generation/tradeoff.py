"""Held-out text -> accuracy and collision of the patches chosen at each temperature.

Accuracy is the share of choices whose first n tokens equal the text's; higher is better. Collision
is the share of pairs of independent choices whose first n tokens are equal; lower is more diverse.
Temperature trades one for the other.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax import errors
from calm_jax.data import pipeline
from calm_jax.data import store as store_lib
from calm_jax.generation import candidates, choosers, requests, rules, temperature
from calm_jax.models import calm, layers
from calm_jax.objectives import autoencoding, brier
from calm_jax.training import trained as trained_lib

# Patches whose draws are in memory at once.
ROWS = 16


def _figures(correct_Pn: np.ndarray, equal_Pn: np.ndarray) -> dict[str, Any]:
  """Returns means over patches and their standard errors in percent, each a list over n."""

  def error(x_Pn: np.ndarray) -> list[float]:
    return (100 * x_Pn.std(axis=0) / max(len(x_Pn) - 1, 1) ** 0.5).tolist()

  return {
    "accuracy": (100 * correct_Pn.mean(axis=0)).tolist(),
    "accuracy_error": error(correct_Pn),
    "collision": (100 * equal_Pn.mean(axis=0)).tolist(),
    "collision_error": error(equal_Pn),
  }


def _blocks(
  store: store_lib.TokenStore, context: int, patches: int, per_block: int
) -> Iterator[np.ndarray]:
  """Yields held-out blocks [1, S], enough for `patches` predicted patches at `per_block` each."""
  limit = -(-patches // per_block)
  for block, _ in pipeline.heldout_batches(store, context, 1, limit, np.arange(1)):
    yield block["tokens"]


class _Setting(NamedTuple):
  """The settings of a row: a sampler, a temperature and N, the maximum number of draws."""

  sampler: requests.Sampler
  temperature: float
  num_candidates: int


def _settings(
  samplers: Sequence[requests.Sampler], temperatures: Sequence[float], numbers: Sequence[int]
) -> list[_Setting]:
  """Returns every combination; at temperature 1, where one draw decides, N is 1."""
  return [
    _Setting(sampler, value, number)
    for sampler in samplers
    for value in temperatures
    for number in (numbers if value != 1 else [1])
  ]


class _Sampled(NamedTuple):
  """Up to ROWS predicted patches, padded to B = ROWS rows, with their draws.

  Attributes:
    target_RK: the text's tokens in the R patches that are not padding.
    pool_2BNK: two independent pools of draws.
    key_2B: a key for each choice from them.
  """

  target_RK: np.ndarray
  pool_2BNK: jax.Array
  key_2B: jax.Array


def _hidden_of(trained: trained_lib.Trained) -> Callable[..., jax.Array]:
  """Returns (tokens [1, P, K], key) -> hidden states [P, D]."""
  model, autoencoder = trained.model, trained.parents["autoencoder"]

  @jax.jit
  def hidden(token_1PK, key):
    latent_1PZ = None
    if trained.run.model.reads_latents:
      posterior = layers.apply(autoencoder.model, autoencoder.params, token_1PK, method="encode")
      mean_1PZ, log_std_1PZ = posterior
      latent_1PZ = autoencoding.posterior_draws(key, mean_1PZ, log_std_1PZ, 1)[0]
    return model.hidden(trained.params, token_1PK, latent_1PZ)[0][0]

  return hidden


def _pools_of(trained: trained_lib.Trained, draws: int) -> Callable[..., jax.Array]:
  """Returns (hidden [B, D], key) -> two pools of N = `draws` patches per row, [2, B, N, K]."""
  model, autoencoder = trained.model, trained.parents["autoencoder"]

  @jax.jit
  def pools(hidden_BD, key):
    z_NBZ = model.sample(trained.params, hidden_BD, key, 2 * draws)
    token_NBK = calm.decode_tokens(autoencoder.model, autoencoder.params, z_NBZ)
    return jnp.moveaxis(token_NBK.reshape(2, draws, *token_NBK.shape[1:]), 2, 1)

  return pools


def _samples(
  trained: trained_lib.Trained, store: store_lib.TokenStore, draws: int, patches: int, seed: int
) -> Iterator[_Sampled]:
  """Yields `patches` predicted patches from all over the held-out text, with their draws."""
  hidden, pools = _hidden_of(trained), _pools_of(trained, draws)
  size, context = trained.model.sizes.patch_size, trained.run.data.context
  predicted = context // size - 1
  per_block, num_left = min(predicted, 4 * ROWS), patches
  for number, token_1S in enumerate(_blocks(store, context, patches, per_block)):
    token_1PK = token_1S.reshape(1, -1, size)
    block_key = jax.random.fold_in(jax.random.key(seed), number)
    hidden_PD = hidden(token_1PK, jax.random.fold_in(block_key, 0))
    positions = np.linspace(0, predicted - 1, min(per_block, num_left)).astype(int)
    for begin in range(0, len(positions), ROWS):
      chunk = positions[begin : begin + ROWS]
      padded = np.resize(chunk, ROWS)  # Chunks of one shape share one program.
      key = jax.random.fold_in(block_key, begin + 1)
      yield _Sampled(
        token_1PK[0, chunk + 1],
        pools(hidden_PD[padded], jax.random.fold_in(key, 0)),
        jax.random.split(jax.random.fold_in(key, 1), (2, ROWS)),
      )
    num_left -= len(positions)


@functools.partial(jax.jit, static_argnames=("sampler", "slots"))
def _chosen(pool_BNK, power, key_B, sampler: requests.Sampler, slots: int) -> candidates.Choice:
  """Returns the choice among each row's draws, at most `slots` of them."""
  rows, _, size = pool_BNK.shape
  ones_B = jnp.ones(rows, jnp.int32)
  wanted = candidates.Wanted(
    key_B=key_B,
    power_B=power * ones_B,
    limit_B=slots * ones_B,
    attempts_B=slots * ones_B,
    tail_BK=jnp.zeros((rows, size), jnp.int32),
    length_B=0 * ones_B,
    active_B=ones_B > 0,
  )

  def draw(row_S, number_S):
    return candidates.Candidate(pool_BNK[row_S, number_S], None)

  rule, chooser = rules.RULES[sampler.rule], choosers.CHOOSERS[sampler.at_limit]
  return candidates.choose(wanted, draw, rule, chooser, slots, [rows])


def _pair(setting: _Setting, sampled: _Sampled) -> list[candidates.Choice]:
  """Returns a choice from each of the two pools, on the host, without padding."""
  power, rows = temperature.power(setting.temperature), len(sampled.target_RK)
  pair = [
    _chosen(pool_BNK, power, key_B, setting.sampler, setting.num_candidates)
    for pool_BNK, key_B in zip(sampled.pool_2BNK, sampled.key_2B, strict=True)
  ]
  return jax.tree.map(lambda x: np.asarray(x)[:rows], pair)


def _equal_so_far(a_PK: np.ndarray, b_PK: np.ndarray) -> np.ndarray:
  """Returns whether the first n tokens are equal, for n = 1, 2, ..., int [P, n]."""
  return np.cumprod(a_PK == b_PK, axis=-1)[:, : brier.ORDERS]


def _row(
  setting: _Setting, pairs: list[list[candidates.Choice]], target_PK: np.ndarray
) -> dict[str, Any]:
  """Returns the figures of a setting's pairs of choices."""
  first, second = jax.tree.map(lambda *x: np.concatenate(x), *pairs)
  correct = [_equal_so_far(choice.patch.token_K, target_PK) for choice in (first, second)]
  equal_Pn = _equal_so_far(first.patch.token_K, second.patch.token_K)
  return {
    "rule": setting.sampler.rule,
    "at_limit": setting.sampler.at_limit,
    "temperature": setting.temperature,
    "num_candidates": setting.num_candidates,
    "patches": len(target_PK),
    "draws": float(first.seen_B.mean()),
    "settled": float(first.settled_B.mean()),
    **_figures(np.mean(correct, axis=0), equal_Pn),
  }


def _require_reachable(temperatures: Sequence[float], num_candidates: Sequence[int]) -> None:
  """Raises CalmError if N is too large, or too small for a temperature."""
  fewest, most = min(num_candidates), max(num_candidates)
  largest = requests.MOST["num_candidates"]
  if most > largest:
    raise errors.CalmError(f"num_candidates must lie in [1, {largest}], got {most}")
  for value in temperatures:
    power = temperature.power(value)
    if fewest < power:
      raise errors.CalmError(
        f"num_candidates must be at least 1/temperature = {power:g}, got {fewest}"
      )


def of_calm(
  trained: trained_lib.Trained,
  store: store_lib.TokenStore,
  temperatures: Sequence[float],
  num_candidates: Sequence[int],
  samplers: Sequence[requests.Sampler],
  patches: int,
  seed: int,
) -> list[dict[str, Any]]:
  """Returns a row for each sampler, temperature and N, all on the same draws and patches.

  Args:
    patches: the number of predicted patches, from all over the held-out text.

  Raises:
    CalmError: for a temperature that needs more candidates than the smallest N.
  """
  _require_reachable(temperatures, num_candidates)
  pairs = {setting: [] for setting in _settings(samplers, temperatures, num_candidates)}
  targets = []
  for sampled in _samples(trained, store, max(num_candidates), patches, seed):
    targets.append(sampled.target_RK)
    for setting in pairs:
      pairs[setting].append(_pair(setting, sampled))
  target_PK = np.concatenate(targets)
  return [_row(setting, choices, target_PK) for setting, choices in pairs.items()]


def of_transformer(
  trained: trained_lib.Trained,
  store: store_lib.TokenStore,
  temperatures: Sequence[float],
  num_candidates: Sequence[int],
  samplers: Sequence[requests.Sampler],
  patches: int,
  seed: int,
) -> list[dict[str, Any]]:
  """Returns a row for each temperature, of single tokens (n = 1), from their exact probabilities.

  Candidates, samplers and the seed make no difference: nothing is drawn.

  Raises:
    CalmError: for a temperature that is not above 0, or not finite.
  """

  @jax.jit
  def scores(token_1S, power_T):
    hidden_1SD, _ = layers.apply(trained.model, trained.params, token_1S[:, :-1], method="hidden")

    def at_position(position):
      hidden_D, target = position
      logits_V = layers.apply(trained.model, trained.params, hidden_D, method="logits")
      p_TV = jax.nn.softmax(temperature.tempered(logits_V[None], power_T), axis=-1)
      return p_TV[:, target], jnp.sum(p_TV**2, axis=-1)

    return jax.lax.map(at_position, (hidden_1SD[0], token_1S[0, 1:]))

  power_T = jnp.array([temperature.token_power(value) for value in temperatures], jnp.float32)
  context = trained.run.data.context
  blocks = _blocks(store, context, patches, context - 1)
  pairs = [jax.device_get(scores(token_1S, power_T)) for token_1S in blocks]
  correct_ST, equal_ST = (np.concatenate(part) for part in zip(*pairs, strict=True))
  return [
    {
      "rule": "exact",
      "at_limit": requests.ERROR,
      "temperature": value,
      "num_candidates": 1,
      "patches": len(correct_ST),
      "draws": 1.0,
      "settled": 1.0,
      **_figures(correct_ST[:, [i]], equal_ST[:, [i]]),
    }
    for i, value in enumerate(temperatures)
  ]
