"""Features and a token table -> cross-entropy, the logits of a few positions at a time."""

import functools
from typing import NamedTuple

import jax
from jax import numpy as jnp

from calm_jax.parallel import mesh

# Positions of a device whose logits [V] are in memory at once. Each lot reads and writes
# the table's gradient once: the fewer there are the longer a TPU waits for its memory. A CPU
# is slower with more than 1,024.
AT_ONCE, AT_ONCE_ON_A_CPU = 2048, 1024


class Scores(NamedTuple):
  """What is known of the next tokens, [B, P] each but the loss.

  Attributes:
    loss: the weighted sum of the cross-entropies, nats; alone in having a gradient.
    cross_entropy: −log p(token), nats. Lower is better.
    right: 1 where no token is more likely, else 0.
  """

  loss: jax.Array
  cross_entropy: jax.Array
  right: jax.Array


class _Gradients(NamedTuple):
  feature_BPE: jax.Array
  table_VE: jax.Array


def _summed(logits_nV: jax.Array, token_n: jax.Array) -> jax.Array:
  """Of each position one token's logit: a sum that its neighbours' products are fused with."""
  picked_nV = jnp.arange(logits_nV.shape[-1])[None] == token_n[:, None]
  return jnp.sum(jnp.where(picked_nV, logits_nV, 0), axis=-1)


def _gathered(logits_nV: jax.Array, token_n: jax.Array) -> jax.Array:
  """The same where a sum would write and read all logits once more."""
  return jnp.take_along_axis(logits_nV, token_n[:, None], axis=-1)[:, 0]


def _of_lot(table_VE: jax.Array, lot: tuple[jax.Array, ...], with_gradients: bool):
  """Returns cross-entropy and rightness of n positions, and gradients of their weighted sum."""
  feature_nE, token_n, weight_n = lot
  logits_nV = jnp.einsum("ne,ve->nv", feature_nE, table_VE, preferred_element_type=jnp.float32)
  logits_nV = mesh.constrain_last(logits_nV, None, "width")
  highest_n = jnp.max(logits_nV, axis=-1)
  picked_n = jax.lax.platform_dependent(logits_nV, token_n, cpu=_gathered, default=_summed)
  weight_nV = jnp.exp(logits_nV - highest_n[:, None])
  total_n = jnp.sum(weight_nV, axis=-1)
  cross_entropy_n = highest_n + jnp.log(total_n) - picked_n
  scores = (cross_entropy_n, (picked_n == highest_n).astype(jnp.float32))
  if not with_gradients:
    return scores, None, None
  picked_nV = jnp.arange(logits_nV.shape[-1])[None] == token_n[:, None]
  slope_nV = (weight_nV / total_n[:, None] - picked_nV) * weight_n[:, None]
  slope_nV = slope_nV.astype(feature_nE.dtype)
  sums = {"preferred_element_type": jnp.float32}
  of_feature_nE = jnp.einsum("nv,ve->ne", slope_nV, table_VE, **sums).astype(feature_nE.dtype)
  # Not "ve", for which a CPU would transpose the slopes, and not the features alone.
  return scores, of_feature_nE, jnp.einsum("ne,nv->ev", feature_nE, slope_nV, **sums)


def _of_shard(table_VE: jax.Array, feature_nE, token_n, weight_n, with_gradients: bool):
  """The same of all positions of a device, AT_ONCE at a time."""
  count = token_n.shape[0]
  size = min(AT_ONCE_ON_A_CPU if mesh.platform() == "cpu" else AT_ONCE, count)

  def cut(x):
    filled = jnp.concatenate([x, jnp.zeros((-count % size, *x.shape[1:]), x.dtype)])
    return filled.reshape(-1, size, *x.shape[1:])

  def add(of_table_EV, lot):
    scores, of_feature_nE, more_EV = _of_lot(table_VE, lot, with_gradients)
    if with_gradients:
      of_table_EV = mesh.constrain_last(of_table_EV + more_EV, None, "width")
    return of_table_EV, (scores, of_feature_nE)

  zeros = jnp.zeros(table_VE.shape[::-1] if with_gradients else ())
  lots = jax.tree.map(cut, (feature_nE, token_n, weight_n))
  of_table_EV, found = jax.lax.scan(add, zeros, lots)
  whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)
  return whole, of_table_EV.T


def _scores(table_VE, feature_BPE, token_BP, weight_BP, with_gradients: bool):
  # Gathered here, not in each turn of the loop.
  table_VE = mesh.constrain(table_VE.astype(feature_BPE.dtype), "width", None)
  one = functools.partial(_of_shard, table_VE, with_gradients=with_gradients)
  whole, of_table_VE = mesh.shards(one)(feature_BPE, token_BP, weight_BP)
  (cross_entropy_BP, right_BP), of_feature_BPE = whole
  loss = jnp.sum(cross_entropy_BP * weight_BP)
  scores = Scores(loss, cross_entropy_BP, right_BP)
  return scores, _Gradients(of_feature_BPE, of_table_VE)


@jax.custom_vjp
def cross_entropy(
  table_VE: jax.Array, feature_BPE: jax.Array, token_BP: jax.Array, weight_BP: jax.Array
) -> Scores:
  """Returns how likely tokens are where logits are features · table.

  Forward and backward, V beside positions is there for a few of them only: the gradient
  is added up as the loss is, by the weights, which are constants to it.

  Args:
    table_VE: float32; products are computed in the features' type and summed in float32.
    weight_BP: of each position in the loss, as 1/(B·P) for the mean.
  """
  return _scores(table_VE, feature_BPE, token_BP, weight_BP, with_gradients=False)[0]


def _forward(table_VE, feature_BPE, token_BP, weight_BP):
  return _scores(table_VE, feature_BPE, token_BP, weight_BP, with_gradients=True)


def _backward(gradients: _Gradients, slopes: Scores):
  def scaled(x):
    return (x * slopes.loss).astype(x.dtype)

  return scaled(gradients.table_VE), scaled(gradients.feature_BPE), None, None


cross_entropy.defvjp(_forward, _backward)
