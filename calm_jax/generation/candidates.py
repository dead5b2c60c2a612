"""Hidden states -> one patch a row: candidates drawn in rounds until every row is settled."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from calm_jax.generation import choosers, rules

# The largest round, in candidates of all rows together, and the smallest that is worth it:
# fewer take as long, as the weights must be read anyway.
ROUND, FEWEST = 64, 8

# The uses of a row's key.
DRAW, _RULE, _CHOICE, POSTERIOR = range(4)


class Wanted(NamedTuple):
  """What each of B rows asks for.

  Attributes:
    key_B: of its draws; a row's i-th draw depends on nothing but this key and i.
    power_B: s = 1/T.
    limit_B: N, draws that a rule sees at most.
    attempts_B: candidates drawn at most, those too that do not begin with the tail.
    tail_BK, length_B: tokens that the patch must begin with, and how many they are.
    active_B: rows that want a patch at all.
  """

  key_B: jax.Array
  power_B: jax.Array
  limit_B: jax.Array
  attempts_B: jax.Array
  tail_BK: jax.Array
  length_B: jax.Array
  active_B: jax.Array


class Candidate(NamedTuple):
  """Tokens, and the latent they were decoded from where somebody reads it."""

  token_K: jax.Array
  latent_Z: jax.Array | None


class Choice(NamedTuple):
  """The next patch of each row, and what it took.

  Attributes:
    patch: of B rows.
    settled_B: by the rule; else the draws ended before, and one was chosen from them all.
    drawn_B: candidates made. agreed_B: those of them that begin with the whole tail.
    seen_B: those of these that the rule saw before it was settled.
    longest_B: tokens of the tail that the patch begins with: where it is not all of it, no
      candidate did better.
  """

  patch: Candidate
  settled_B: jax.Array
  drawn_B: jax.Array
  agreed_B: jax.Array
  seen_B: jax.Array
  longest_B: jax.Array


class _Pool(NamedTuple):
  """Draws that begin with their row's tail, in order, and what became of them.

  Attributes:
    held: candidates [B, N, ...], held_B of them. seen_B: how many the rule has seen.
    best: of the candidates that do not begin with the tail the one that does longest.
  """

  held: Candidate
  held_B: jax.Array
  drawn_B: jax.Array
  agreed_B: jax.Array
  seen_B: jax.Array
  progress: rules.Progress
  best: Candidate
  longest_B: jax.Array
  rounds: jax.Array


def keys_of(key_B: jax.Array, use: int, number_B: jax.Array) -> jax.Array:
  """Returns the keys of some rows for one of the uses of randomness, and a number each."""
  return jax.vmap(lambda key, number: jax.random.fold_in(jax.random.fold_in(key, use), number))(
    key_B, number_B
  )


def round_sizes(rows: int, least: int, most: int) -> list[int]:
  """Returns the candidates of each round, of all rows together; the last one repeats.

  The first is about as many as a sure model needs, each further one twice as many.

  Args:
    least, most: draws that a row takes.
  """
  largest = min(max(ROUND, rows), rows * most)
  sizes = [min(max(rows * least, FEWEST), largest)]
  while sizes[-1] < largest:
    sizes.append(min(2 * sizes[-1], largest))
  return sizes


def _rows(tree: Candidate, index: Any) -> Candidate:
  return jax.tree.map(lambda x: x[index], tree)


def choose(
  wanted: Wanted,
  draw: Callable[[jax.Array, jax.Array], Candidate],
  rule: rules.Rule,
  chooser: choosers.Chooser,
  slots: int,
  sizes: list[int],
) -> Choice:
  """Returns a patch for each active row; what it returns for others means nothing.

  Candidates go to rows that are not settled, so that no row waits for the draws of
  another and a settled one costs nothing.

  Args:
    draw: for rows [S] and the numbers of their draws [S], the candidates [S, ...].
    chooser: what takes one of a row's draws where they end before the rule has settled.
    slots: N of the row that has most.
    sizes: see `round_sizes`.
  """
  batch = wanted.length_B.shape[0]
  every_B = jnp.arange(batch)

  def open_rows(pool: _Pool) -> jax.Array:
    more_B = (pool.drawn_B < wanted.attempts_B) & (pool.held_B < wanted.limit_B)
    return wanted.active_B & ~pool.progress.settled_B & more_B

  def fill(pool: _Pool, size: int) -> _Pool:
    """Draws `size` candidates, spread over the open rows."""
    open_B = open_rows(pool)
    order_B, slot_S = jnp.argsort(~open_B), jnp.arange(size)
    count = jnp.maximum(jnp.sum(open_B), 1)
    row_S = order_B[slot_S % count]
    more_S = slot_S // count
    number_S = pool.drawn_B[row_S] + more_S
    used_S = open_B[row_S] & (number_S < wanted.attempts_B[row_S])
    used_S &= more_S < (wanted.limit_B - pool.held_B)[row_S]
    drawn = draw(row_S, number_S)
    within_SK = jnp.arange(wanted.tail_BK.shape[1])[None] < wanted.length_B[row_S][:, None]
    met_SK = jnp.cumprod((drawn.token_K == wanted.tail_BK[row_S]) & within_SK, axis=1)
    met_S = jnp.sum(met_SK, axis=1)
    kept_S = used_S & (met_S == wanted.length_B[row_S])
    used_SB = (row_S[:, None] == every_B[None]) & used_S[:, None]
    kept_SB = used_SB & kept_S[:, None]
    place_S = pool.held_B[row_S] + jnp.cumsum(kept_SB, axis=0)[slot_S, row_S] - 1
    place_S = jnp.where(kept_S, place_S, slots)  # Out of bounds: dropped.

    reach_SB = jnp.where(used_SB, met_S[:, None], -1)
    longest_B, at_B = jnp.max(reach_SB, axis=0), jnp.argmax(reach_SB, axis=0)
    better_B = longest_B > pool.longest_B

    def improved(old: jax.Array, new: jax.Array) -> jax.Array:
      return jnp.where(better_B[:, None], new[at_B], old)

    kept_B = jnp.sum(kept_SB, axis=0)
    return pool._replace(
      held=jax.tree.map(
        lambda x, new: x.at[row_S, place_S].set(new, mode="drop"), pool.held, drawn
      ),
      held_B=jnp.minimum(pool.held_B + kept_B, wanted.limit_B),
      drawn_B=pool.drawn_B + jnp.sum(used_SB, axis=0),
      agreed_B=pool.agreed_B + kept_B,
      best=jax.tree.map(improved, pool.best, drawn),
      longest_B=jnp.maximum(pool.longest_B, longest_B),
      rounds=pool.rounds + 1,
    )

  def unseen(pool: _Pool) -> jax.Array:
    return (pool.seen_B < pool.held_B) & ~pool.progress.settled_B

  def look(pool: _Pool) -> _Pool:
    """Shows the rule the next draw of every row that has one."""
    new_B, index_B = unseen(pool), jnp.minimum(pool.seen_B, slots - 1)
    token_BNK = pool.held.token_K
    same_BN = jnp.all(token_BNK == token_BNK[every_B, index_B][:, None], axis=-1)
    same_BN &= jnp.arange(slots)[None] <= index_B[:, None]
    uniform_B = uniform_BN[every_B, index_B]
    after = rule(pool.progress, rules.Draw(index_B, same_BN, wanted.power_B, uniform_B))
    progress = jax.tree.map(lambda x, new: jnp.where(new_B, new, x), pool.progress, after)
    return pool._replace(seen_B=pool.seen_B + new_B, progress=progress)

  def advance(pool: _Pool) -> _Pool:
    number = jnp.minimum(pool.rounds, len(sizes) - 1)
    pool = jax.lax.switch(number, [functools.partial(fill, size=size) for size in sizes], pool)
    return jax.lax.while_loop(lambda pool: jnp.any(unseen(pool)), look, pool)

  def uniforms() -> jax.Array:
    key_B = keys_of(wanted.key_B, _RULE, zeros_B)
    return jax.vmap(lambda key: jax.random.uniform(key, (slots,)))(key_B)

  zeros_B = jnp.zeros((batch,), jnp.int32)
  # Only a second stage asks for them.
  uniform_BN = jax.lax.cond(
    jnp.any(wanted.power_B != jnp.floor(wanted.power_B)),
    uniforms,
    lambda: jnp.zeros((batch, slots)),
  )
  nothing = jax.eval_shape(draw, every_B, every_B)
  empty = jax.tree.map(lambda x: jnp.zeros((batch, slots, *x.shape[1:]), x.dtype), nothing)
  pool = _Pool(
    held=empty, held_B=zeros_B, drawn_B=zeros_B, agreed_B=zeros_B, seen_B=zeros_B,
    progress=rules.Progress.start(batch), best=_rows(empty, (every_B, 0)), longest_B=zeros_B - 1,
    rounds=jnp.int32(0),
  )  # fmt: skip
  pool = jax.lax.while_loop(lambda pool: jnp.any(open_rows(pool)), advance, pool)
  settled_B = pool.progress.settled_B
  left_B = wanted.active_B & ~settled_B & (pool.held_B > 0)
  chosen_B = jax.lax.cond(
    jnp.any(left_B), lambda: _chosen(pool, wanted, chooser), lambda: pool.progress.star_B
  )
  chosen_B = jnp.where(settled_B, pool.progress.star_B, chosen_B)
  patch = _rows(pool.held, (every_B, chosen_B))
  nothing_B = pool.held_B == 0
  patch = jax.tree.map(lambda x, y: jnp.where(nothing_B[:, None], y, x), patch, pool.best)
  return Choice(patch, settled_B, pool.drawn_B, pool.agreed_B, pool.seen_B, pool.longest_B)


def _chosen(pool: _Pool, wanted: Wanted, chooser: choosers.Chooser) -> jax.Array:
  """Returns the draw of each row that is chosen among all it holds: [B]."""
  here_BN = jnp.arange(pool.held.token_K.shape[1])[None] < pool.held_B[:, None]
  key_B = keys_of(wanted.key_B, _CHOICE, jnp.zeros_like(pool.held_B))
  return chooser(pool.held.token_K, here_BN, wanted.power_B, key_B)
