"""Requests and prompts -> the arrays of a batch, padded to a few sizes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax.generation import candidates, requests
from calm_jax.parallel import mesh

# Candidates that do not begin with the prompt's tail are rejected: at most
# TAIL_ROUNDS * max(N, TAIL_CANDIDATES) are drawn for a prompt with a tail.
TAIL_ROUNDS, TAIL_CANDIDATES = 8, 256
# Prompts are padded to this times a power of two, so that few programs are compiled.
PROMPT_PATCHES = 8
# A ring with more slots than this has a multiple of it. With other numbers of slots, a TPU reads
# the ring in another layout than it stores it in, and copies it in every step.
LANES = 128


class RequestArrays(NamedTuple):
  """The requests of a batch as arrays.

  Attributes:
    first: constraints on the first patch of each text, with the prompts' tails. Later patches have
      other keys and no tail.
    max_tokens_B: new tokens after which a text ends.
  """

  first: candidates.Wanted
  max_tokens_B: jax.Array


def request_arrays(
  batch: Sequence[requests.Request],
  power: Sequence[float],
  draw_power: Sequence[float],
  tails: Sequence[Any],
  patch_size: int,
) -> RequestArrays:
  """Returns a batch of B requests as arrays.

  Args:
    power, draw_power: see `candidates.Wanted`.
    tails: tokens of each prompt after its last complete patch, fewer than K.
    patch_size: K.
  """
  draws = [request.num_candidates for request in batch]
  limit = [n if s != 1 else 1 for s, n in zip(power, draws, strict=True)]
  tail_BK = np.zeros((len(batch), patch_size), np.int32)
  for row, tail in enumerate(tails):
    tail_BK[row, : len(tail)] = tail
  seeds = np.array([request.seed for request in batch], np.uint32)
  numbers = np.array([request.number for request in batch], np.int32)

  def integers(values: Sequence[int]) -> jax.Array:
    return jnp.array(values, jnp.int32)

  first = candidates.Wanted(
    key_B=jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(seeds, numbers),
    power_B=jnp.array(power, jnp.float32),
    draw_power_B=jnp.array(draw_power, jnp.float32),
    limit_B=integers(limit),
    attempts_B=integers([TAIL_ROUNDS * max(n, TAIL_CANDIDATES) for n in limit]),
    tail_BK=jnp.array(tail_BK),
    length_B=integers([len(tail) for tail in tails]),
    active_B=jnp.ones((len(batch),), bool),
  )
  return RequestArrays(first, integers([request.max_tokens for request in batch]))


def aligned(prompts: Sequence[np.ndarray], window: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns prompts [P, K] padded at the front, int32 [B, P, K], and their first patches, [B]."""
  patches = bucket(max(map(len, prompts)), window)
  token_BPK = np.zeros((len(prompts), patches, prompts[0].shape[1]), np.int32)
  for row, token_PK in enumerate(prompts):
    token_BPK[row, patches - len(token_PK) :] = token_PK
  start_B = np.array([patches - len(token_PK) for token_PK in prompts], np.int32)
  return token_BPK, start_B


def placed(tree: Any) -> Any:
  """Shards arrays of rows over the mesh; replicates them if it can't divide the rows."""
  current = mesh.current()
  rows = jax.tree.leaves(tree)[0].shape[0]
  spec = mesh.spec("batch") if rows % mesh.row_parts(current) == 0 else mesh.spec()
  return jax.device_put(tree, jax.sharding.NamedSharding(current, spec))


def ring(patches: int) -> int:
  """Returns the number of slots of a ring for `patches` patches."""
  return patches if patches <= LANES else -(-patches // LANES) * LANES


def bucket(size: int, largest: int) -> int:
  """Returns the smallest of PROMPT_PATCHES times 1, 2, 4, ... that holds `size`, or `largest`."""
  padded = PROMPT_PATCHES
  while padded < size:
    padded *= 2
  return min(padded, largest)
