"""Held-out text -> accuracy and collision of what is taken at each temperature.

Accuracy is how often the first n tokens taken are the text's, collision how often those
of two independent choices are equal: the first is to be high, the second tells what it
costs in diversity. A temperature moves a model along a curve of the two.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax import errors, workdir
from calm_jax.data import pipeline
from calm_jax.data import store as store_lib
from calm_jax.generation import candidates, choosers, requests, rules, temperature
from calm_jax.models import calm, layers
from calm_jax.objectives import brier

# Patches whose draws are in memory at once.
ROWS = 16


def _figures(right_Pn: np.ndarray, equal_Pn: np.ndarray) -> dict[str, Any]:
  """Returns means over patches in percent and their standard errors, n = 1, 2, ... a list."""

  def error(x_Pn: np.ndarray) -> list[float]:
    return (100 * x_Pn.std(axis=0) / max(len(x_Pn) - 1, 1) ** 0.5).tolist()

  return {
    "accuracy": (100 * right_Pn.mean(axis=0)).tolist(),
    "accuracy_error": error(right_Pn),
    "collision": (100 * equal_Pn.mean(axis=0)).tolist(),
    "collision_error": error(equal_Pn),
  }


def _blocks(
  store: store_lib.TokenStore, context: int, patches: int, a_block: int
) -> Iterator[np.ndarray]:
  """Yields held-out blocks [1, S] until they hold so many predicted patches."""
  limit = -(-patches // a_block)
  for block, _ in pipeline.heldout_batches(store, context, 1, limit, np.arange(1)):
    yield block["tokens"]


@functools.partial(jax.jit, static_argnames=("sampler", "slots"))
def _taken(pool_BNK, power, key_B, sampler: requests.Sampler, slots: int):
  """Returns what is taken of each row's draws, at most `slots` of them."""
  rows, _, size = pool_BNK.shape
  ones_B = jnp.ones(rows, jnp.int32)
  wanted = candidates.Wanted(
    key_B=key_B, power_B=power * ones_B, limit_B=slots * ones_B, attempts_B=slots * ones_B,
    tail_BK=jnp.zeros((rows, size), jnp.int32), length_B=0 * ones_B, active_B=ones_B > 0,
  )  # fmt: skip

  def draw(row_S, number_S):
    return candidates.Candidate(pool_BNK[row_S, number_S], None)

  rule, chooser = rules.RULES[sampler.rule], choosers.CHOOSERS[sampler.at_limit]
  return candidates.choose(wanted, draw, rule, chooser, slots, [rows])


def _equal_so_far(a_PK: np.ndarray, b_PK: np.ndarray) -> np.ndarray:
  return np.cumprod(a_PK == b_PK, axis=-1)


def of_calm(
  trained: workdir.TrainedCalm,
  store: store_lib.TokenStore,
  temperatures: Sequence[float],
  num_candidates: Sequence[int],
  samplers: Sequence[requests.Sampler],
  patches: int,
  seed: int,
) -> list[dict[str, Any]]:
  """Returns a row for each sampler, temperature and N, all on the same draws and patches.

  Args:
    patches: predicted ones that are used, from all over the held-out text.
  """
  model, most = trained.model, max(num_candidates)
  size = model.autoencoder.sizes.patch_size
  key = jax.random.key(seed)

  @jax.jit
  def hidden(token_1PK, key):
    latent_1PZ = None
    if trained.run.model.reads_latents:
      codec, frozen = model.autoencoder, trained.autoencoder.params
      mean_1PZ, log_std_1PZ = layers.apply(codec, frozen, token_1PK, method="encode")
      latent_1PZ = calm.posterior_draws(key, mean_1PZ, log_std_1PZ, 1)[0]
    return model.hidden(trained.params, token_1PK, latent_1PZ)[0][0]

  @jax.jit
  def draws(hidden_BD, key):
    """Two pools of draws: [2, B, N, K]."""
    z_NBZ = model.sample(trained.params, hidden_BD, key, 2 * most)
    token_NBK = calm.decode_tokens(model.autoencoder, trained.autoencoder.params, z_NBZ)
    return jnp.moveaxis(token_NBK.reshape(2, most, *token_NBK.shape[1:]), 2, 1)

  settings = [
    (sampler, value, n if value != 1 else 1)
    for sampler in samplers
    for value in temperatures
    for n in (num_candidates if value != 1 else num_candidates[:1])
  ]
  found: dict[Any, list[Any]] = {setting: [] for setting in settings}
  each = min(trained.run.data.context // size - 1, 4 * ROWS)  # Of a block.
  left, targets = patches, []
  for number, token_1S in enumerate(_blocks(store, trained.run.data.context, patches, each)):
    token_1PK = token_1S.reshape(1, -1, size)
    block_key = jax.random.fold_in(key, number)
    hidden_PD = hidden(token_1PK, jax.random.fold_in(block_key, 0))
    places = np.linspace(0, token_1PK.shape[1] - 2, min(each, left, token_1PK.shape[1] - 1))
    for begin in range(0, len(places), ROWS):
      some = places[begin : begin + ROWS].astype(int)
      filled = np.resize(some, ROWS)  # One program for all.
      own = jax.random.fold_in(block_key, begin + 1)
      pool_2BNK = draws(hidden_PD[filled], jax.random.fold_in(own, 0))
      key_2B = jax.random.split(jax.random.fold_in(own, 1), (2, ROWS))
      targets.append(token_1PK[0, some + 1])
      for sampler, value, n in settings:
        power = temperature.power(value)
        pair = [
          _taken(pool_BNK, power, key_B, sampler, n)
          for pool_BNK, key_B in zip(pool_2BNK, key_2B, strict=True)
        ]
        found[sampler, value, n].append(
          jax.tree.map(lambda x, some=some: np.asarray(x)[: len(some)], pair)
        )
    left -= len(places)
  target_PK = np.concatenate(targets)
  orders = min(size, brier.ORDERS)
  result = []
  for (sampler, value, n), pairs in found.items():
    one, other = (
      jax.tree.map(lambda *x: np.concatenate(x), *(pair[i] for pair in pairs)) for i in range(2)
    )
    right = [_equal_so_far(x.patch.token_K, target_PK)[:, :orders] for x in (one, other)]
    equal = _equal_so_far(one.patch.token_K, other.patch.token_K)[:, :orders]
    result.append({
      "rule": sampler.rule, "at_limit": sampler.at_limit, "temperature": value,
      "num_candidates": n, "patches": len(target_PK),
      "draws": float(one.seen_B.mean()), "settled": float(one.settled_B.mean()),
      **_figures(np.mean(right, axis=0), equal),
    })  # fmt: skip
  return result


def of_transformer(
  trained: workdir.TrainedTransformer,
  store: store_lib.TokenStore,
  temperatures: Sequence[float],
  patches: int,
) -> list[dict[str, Any]]:
  """Returns a row for each temperature: of single tokens, n = 1, whose law is known exactly.

  Raises:
    CalmError: for a temperature that is not above 0, or not finite.
  """

  @jax.jit
  def laws(token_1S, power_T):
    hidden_1SD, _ = layers.apply(trained.model, trained.params, token_1S[:, :-1], method="hidden")

    def one(position):
      hidden_D, target = position
      logits_V = layers.apply(trained.model, trained.params, hidden_D, method="logits")
      p_TV = jax.nn.softmax(temperature.tempered(logits_V[None], power_T), axis=-1)
      return p_TV[:, target], jnp.sum(p_TV**2, axis=-1)

    return jax.lax.map(one, (hidden_1SD[0], token_1S[0, 1:]))

  power_T = jnp.array([temperature.token_power(value) for value in temperatures], jnp.float32)
  context = trained.run.data.context
  found = [laws(x, power_T) for x in _blocks(store, context, patches, context - 1)]
  right_ST, equal_ST = (np.concatenate([np.asarray(x[i]) for x in found]) for i in range(2))
  return [
    {
      "rule": "exact", "at_limit": requests.ERROR, "temperature": value, "num_candidates": 1,
      "patches": len(right_ST),
      "draws": 1.0, "settled": 1.0, **_figures(right_ST[:, [i]], equal_ST[:, [i]]),
    }
    for i, value in enumerate(temperatures)
  ]  # fmt: skip


def measure(
  trained: workdir.Trained, store: store_lib.TokenStore, temperatures: Sequence[float],
  num_candidates: Sequence[int], samplers: Sequence[requests.Sampler], patches: int, seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
  """Returns the rows of `of_calm` or `of_transformer`.

  Raises:
    CalmError: for a stage that writes no text, or a setting that can't be.
  """
  if isinstance(trained, workdir.TrainedTransformer):
    return of_transformer(trained, store, temperatures, patches)
  if not isinstance(trained, workdir.TrainedCalm):
    raise errors.CalmError("an autoencoder writes no text: temperatures are for language models")
  most, largest = max(num_candidates), requests.MOST["num_candidates"]
  if most > largest:
    raise errors.CalmError(f"num_candidates must lie in [1, {largest}], got {most}")
  for value in temperatures:
    power = temperature.power(value)
    fewest = min(num_candidates)
    if fewest < power:
      raise errors.CalmError(
        f"num_candidates must be at least 1/temperature = {power:g}, got {fewest}"
      )
  return of_calm(trained, store, temperatures, num_candidates, samplers, patches, seed)
