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

from calm_jax import config
from calm_jax.data import pipeline
from calm_jax.data import store as store_lib
from calm_jax.generation import candidates, choosers, laws, requests, rules, temperature
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
  """The settings of a row: a sampler, a temperature and N, the maximum number of draws.

  Attributes:
    draw_power, power: s of the draws, and the power that a race adds; see `laws.CalmLaw.powers`.
  """

  sampler: requests.Sampler
  temperature: float
  num_candidates: int
  draw_power: float
  power: float


def _settings(
  trained: trained_lib.Trained,
  law: type[laws.CalmLaw],
  samplers: Sequence[requests.Sampler],
  temperatures: Sequence[float],
  numbers: Sequence[int],
) -> list[_Setting]:
  """Returns every combination; where one draw decides, N is 1."""
  settings = []
  for sampler in samplers:
    powers = law(trained, sampler).powers
    for value in temperatures:
      for number in numbers:
        draw_power, power = powers(requests.Request((), value, number))
        settings.append(_Setting(sampler, value, number if power != 1 else 1, draw_power, power))
  return list(dict.fromkeys(settings))


class _Sampled(NamedTuple):
  """Up to ROWS predicted patches, padded to B = ROWS rows.

  Attributes:
    target_RK: the text's tokens in the R patches that are not padding.
    hidden_BD: hidden states that predict them.
    draw_key: key of the draws.
    key_2B: a key for each choice from them.
  """

  target_RK: np.ndarray
  hidden_BD: jax.Array
  draw_key: jax.Array
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


# (hidden [B, D], key, s of the draws, N) -> two pools of N patches per row, [2, B, N, K].
Pools = Callable[[jax.Array, jax.Array, float, int], jax.Array]


def _pools(sample: Callable[..., jax.Array], autoencoder: trained_lib.Trained) -> Pools:
  """Returns the function of pools.

  Args:
    sample: (hidden [B, D], key, s [B], N) -> latents [N, B, Z].
  """

  @functools.partial(jax.jit, static_argnames="draws")
  def pools(hidden_BD, key, draw_power, draws: int):
    power_B = jnp.full(len(hidden_BD), draw_power)
    z_NBZ = sample(hidden_BD, key, power_B, 2 * draws)
    token_NBK = calm.decode_tokens(autoencoder.model, autoencoder.params, z_NBZ)
    return jnp.moveaxis(token_NBK.reshape(2, draws, *token_NBK.shape[1:]), 2, 1)

  return pools


def _samples(
  trained: trained_lib.Trained, store: store_lib.TokenStore, patches: int, seed: int
) -> Iterator[_Sampled]:
  """Yields `patches` predicted patches from all over the held-out text."""
  hidden = _hidden_of(trained)
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
        hidden_PD[padded],
        jax.random.fold_in(key, 0),
        jax.random.split(jax.random.fold_in(key, 1), (2, ROWS)),
      )
    num_left -= len(positions)


@functools.partial(jax.jit, static_argnames=("sampler", "slots"))
def _chosen(pool_BNK, power, key_B, sampler: requests.Sampler, slots: int) -> candidates.Choice:
  """Returns the choice among each row's draws, at most `slots` of them."""
  rule, chooser = rules.RULES[sampler.rule], choosers.CHOOSERS[sampler.at_limit]
  power_B = jnp.full(len(pool_BNK), power)
  return candidates.choose_from(pool_BNK, power_B, key_B, rule, chooser, slots)


def _pairs(
  settings: Sequence[_Setting], sampled: _Sampled, pools: Pools
) -> dict[_Setting, list[candidates.Choice]]:
  """Returns, per setting, a choice from each of two pools, on the host, without padding.

  Settings whose draws have the same temperature share their pools.
  """
  most: dict[float, int] = {}
  for setting in settings:
    most[setting.draw_power] = max(most.get(setting.draw_power, 0), setting.num_candidates)
  pairs = {}
  for number, (draw_power, draws) in enumerate(most.items()):
    key = jax.random.fold_in(sampled.draw_key, number) if number else sampled.draw_key
    pool_2BNK = pools(sampled.hidden_BD, key, draw_power, draws)
    for setting in settings:
      if setting.draw_power == draw_power:
        pairs[setting] = _pair(setting, pool_2BNK, sampled)
  return {setting: pairs[setting] for setting in settings}


def _pair(setting: _Setting, pool_2BNK, sampled: _Sampled) -> list[candidates.Choice]:
  pair = [
    _chosen(pool_BNK, setting.power, key_B, setting.sampler, setting.num_candidates)
    for pool_BNK, key_B in zip(pool_2BNK, sampled.key_2B, strict=True)
  ]
  return jax.tree.map(lambda x: np.asarray(x)[: len(sampled.target_RK)], pair)


def _equal_so_far(a_PK: np.ndarray, b_PK: np.ndarray) -> np.ndarray:
  """Returns whether the first n tokens are equal, for n = 1, 2, ..., int [P, n]."""
  return np.cumprod(a_PK == b_PK, axis=-1)[:, : brier.ORDERS]


class _Outcome(NamedTuple):
  """A setting's two independent choices of every patch, tokens [P, K], and what they took."""

  first: candidates.Choice
  second: candidates.Choice

  @property
  def tokens(self) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(self.first.patch.token_K), np.asarray(self.second.patch.token_K)


def _row(setting: _Setting, outcome: _Outcome, target_PK: np.ndarray) -> dict[str, Any]:
  """Returns the figures of a setting."""
  correct = [_equal_so_far(token_PK, target_PK) for token_PK in outcome.tokens]
  return {
    "rule": setting.sampler.rule,
    "at_limit": setting.sampler.at_limit,
    "temperature": setting.temperature,
    "num_candidates": setting.num_candidates,
    "patches": len(target_PK),
    "draws": float(outcome.first.seen_B.mean()),
    "settled": float(outcome.first.settled_B.mean()),
    **_figures(np.mean(correct, axis=0), _equal_so_far(*outcome.tokens)),
  }


def _distance(a: _Outcome, b: _Outcome) -> dict[str, list[float]]:
  """Returns C(P,P) − 2 C(P,Q) + C(Q,Q) in percent, for n = 1 to 4, and its standard error.

  C is the probability that two independent choices begin with the same n tokens. The expectation
  is Σ (P − Q)² over the patches' first n tokens: 0 for equal laws, lower is nearer. An estimate may
  be negative. Choices from different pools are compared, as those from one pool are not
  independent.
  """
  within_Pn = _equal_so_far(*a.tokens) + _equal_so_far(*b.tokens)
  pairs = zip(a.tokens, reversed(b.tokens), strict=True)
  distance_Pn = within_Pn - sum(_equal_so_far(*pair) for pair in pairs)
  error_n = 100 * distance_Pn.std(axis=0) / max(len(distance_Pn) - 1, 1) ** 0.5
  return {
    "distance": (100 * distance_Pn.mean(axis=0)).tolist(),
    "distance_error": error_n.tolist(),
  }


def _require_reachable(temperatures: Sequence[float], num_candidates: Sequence[int]) -> None:
  """Raises CalmError if a temperature or N is out of range."""
  most, largest = max(num_candidates), requests.MOST["num_candidates"]
  config.require(most <= largest, f"num_candidates must lie in [1, {largest}], got {most}")
  for value in temperatures:
    temperature.power(value)


def of_calm(
  trained: trained_lib.Trained,
  store: store_lib.TokenStore,
  temperatures: Sequence[float],
  num_candidates: Sequence[int],
  samplers: Sequence[requests.Sampler],
  patches: int,
  seed: int,
) -> list[dict[str, Any]]:
  """Returns a row for each sampler, temperature and N, all on the same patches.

  Samplers at draws of the same temperature choose from the same draws. Each row after the first
  sampler's has its `distance` from that sampler at the same temperature; see `_distance`.

  Args:
    patches: the number of predicted patches, from all over the held-out text.

  Raises:
    CalmError: for a temperature that needs more candidates than the smallest N.
  """
  _require_reachable(temperatures, num_candidates)
  settings = _settings(trained, laws.CalmLaw, samplers, temperatures, num_candidates)

  def sample(hidden_BD, key, power_B, draws: int):
    return trained.model.sample(trained.params, hidden_BD, key, draws)

  pools = _pools(sample, trained.parents["autoencoder"])
  return _rows(trained, store, settings, pools, patches, seed)


def of_tempered(
  trained: trained_lib.Trained,
  store: store_lib.TokenStore,
  temperatures: Sequence[float],
  num_candidates: Sequence[int],
  samplers: Sequence[requests.Sampler],
  patches: int,
  seed: int,
) -> list[dict[str, Any]]:
  """Returns the rows of a language model and its tempered head; see `of_calm`."""
  _require_reachable(temperatures, num_candidates)
  settings = _settings(trained, laws.TemperedLaw, samplers, temperatures, num_candidates)
  parent = trained.parents["calm"]

  def sample(hidden_BD, key, power_B, draws: int):
    def own(key):
      return parent.model.sample(parent.params, hidden_BD, key, draws)

    def tempered(key):
      return trained.model.sample(trained.params, hidden_BD, power_B, key, draws)

    return jax.lax.cond(power_B[0] > 1, tempered, own, key)

  pools = _pools(sample, parent.parents["autoencoder"])
  return _rows(parent, store, settings, pools, patches, seed)


def _rows(
  trained: trained_lib.Trained,
  store: store_lib.TokenStore,
  settings: Sequence[_Setting],
  pools: Pools,
  patches: int,
  seed: int,
) -> list[dict[str, Any]]:
  """Returns a row for each setting, on predicted patches of one language model."""
  pairs, targets = {setting: [] for setting in settings}, []
  for sampled in _samples(trained, store, patches, seed):
    targets.append(sampled.target_RK)
    for setting, pair in _pairs(settings, sampled, pools).items():
      pairs[setting].append(pair)
  target_PK = np.concatenate(targets)
  outcomes = {
    setting: _Outcome(*jax.tree.map(lambda *x: np.concatenate(x), *parts))
    for setting, parts in pairs.items()
  }
  reference = {}
  for setting, outcome in outcomes.items():
    reference.setdefault(setting.temperature, (setting.sampler, outcome))
  rows = []
  for setting, outcome in outcomes.items():
    sampler, first = reference[setting.temperature]
    distance = _distance(outcome, first) if setting.sampler != sampler else {}
    rows.append({**_row(setting, outcome, target_PK), **distance})
  return rows


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
