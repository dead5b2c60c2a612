"""All draws of a row -> the chosen one, if the rule has not settled; one function per chooser."""

from collections.abc import Callable

import jax
from jax import numpy as jnp

from calm_jax.generation import temperature


def _counts(same: Callable[[jax.Array, jax.Array], jax.Array], x_BN, is_draw_BN) -> jax.Array:
  """Returns how often each draw occurs among its row's draws, int [B, N]; 0 in empty slots."""

  def row_counts(row):
    x_N, is_draw_N = row
    equal_NN = same(x_N[:, None], x_N[None]) & is_draw_N[None]
    return jnp.where(is_draw_N, jnp.sum(equal_NN, axis=1), 0)

  return jax.lax.map(row_counts, (x_BN, is_draw_BN))


def batch(token_BNK, is_draw_BN, power_B, key_B) -> jax.Array:
  """Chooses a patch by the number of draws that equal it; see `temperature.log_weights`.

  As N grows, the distribution tends to P(x)^(1/T) / Σ P^(1/T) over patches. If patches rarely
  repeat, that takes many draws. Returns the index of the chosen draw, int [B].

  Source: CALM (arXiv:2510.27688), algorithm 2.
  """

  def same(a_K, b_K):
    return jnp.all(a_K == b_K, axis=-1)

  log_BN = temperature.log_weights(_counts(same, token_BNK, is_draw_BN), power_B)
  return jax.vmap(jax.random.categorical)(key_B, log_BN)


def prefix(token_BNK, is_draw_BN, power_B, key_B) -> jax.Array:
  """Chooses token by token, by the number of draws that continue the chosen tokens.

  The weights are those of `batch`, applied to the next token of the draws that begin with
  the tokens chosen so far. As N grows, the distribution tends to the product of
  P(token | previous tokens)^(1/T), each factor normalized: a Transformer's temperature, which for
  T < 1 is flatter over patches than P(patch)^(1/T). Few draws suffice, because prefixes repeat
  more often than patches. Returns the index of the chosen draw, int [B].
  """
  for position in range(token_BNK.shape[-1]):
    token_BN = token_BNK[..., position]
    log_BN = temperature.log_weights(_counts(jnp.equal, token_BN, is_draw_BN), power_B)
    position_key_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_B, position)
    chosen_B = jax.vmap(jax.random.categorical)(position_key_B, log_BN)
    is_draw_BN &= token_BN == jnp.take_along_axis(token_BN, chosen_B[:, None], axis=1)
  return jnp.argmax(is_draw_BN, axis=1)


Chooser = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

# (draws [B, N, K], whether a slot has a draw [B, N], 1/T [B], keys [B]) -> index of a draw [B].
CHOOSERS: dict[str, Chooser] = {"batch": batch, "prefix": prefix}
