"""Draws of each row -> one of them, where a number of draws is all there is: one row a way."""

from collections.abc import Callable

import jax
from jax import numpy as jnp

from calm_jax.generation import temperature


def _counts(same: Callable[[jax.Array, jax.Array], jax.Array], x_BN, here_BN) -> jax.Array:
  """Returns how often each draw that is here occurs among those that are: int [B, N]."""

  def row(one):
    x_N, here_N = one
    return jnp.where(here_N, jnp.sum(same(x_N[:, None], x_N[None]) & here_N[None], axis=1), 0)

  return jax.lax.map(row, (x_BN, here_BN))


def batch(token_BNK, here_BN, power_B, key_B) -> jax.Array:
  """By the number of equal patches; see `temperature.log_weights`.

  As N grows the law tends to P(x)^(1/T) / Σ P^(1/T) over whole patches. Where patches
  rarely repeat it takes many draws.

  Source: CALM (arXiv:2510.27688), algorithm 2.
  """

  def same(a_K, b_K):
    return jnp.all(a_K == b_K, axis=-1)

  log_BN = temperature.log_weights(_counts(same, token_BNK, here_BN), power_B)
  return jax.vmap(jax.random.categorical)(key_B, log_BN)


def prefix(token_BNK, here_BN, power_B, key_B) -> jax.Array:
  """Token by token, each by the number of draws that go on with it after those before.

  The batch rule's weights, of the next token among the draws that begin with the tokens
  chosen so far. As N grows the law tends to the product of P(token | tokens before)^(1/T),
  each normalized: a Transformer's temperature, which for T < 1 is flatter over patches than
  P(patch)^(1/T). Beginnings repeat where patches do not, so few draws do.
  """
  for place in range(token_BNK.shape[-1]):
    token_BN = token_BNK[..., place]
    log_BN = temperature.log_weights(_counts(jnp.equal, token_BN, here_BN), power_B)
    place_key_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_B, place)
    chosen_B = jax.vmap(jax.random.categorical)(place_key_B, log_BN)
    here_BN &= token_BN == jnp.take_along_axis(token_BN, chosen_B[:, None], axis=1)
  return jnp.argmax(here_BN, axis=1)


Chooser = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

# For draws [B, N, K], of which some are here [B, N], 1/T [B] and keys [B]: their number [B].
CHOOSERS: dict[str, Chooser] = {"batch": batch, "prefix": prefix}
