"""Hidden states -> one patch per row, chosen from candidates that are drawn in rounds."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from calm_jax.generation import choosers, rules

# Most and fewest candidates per round, over all rows. Smaller rounds take as long, because each
# round reads the weights.
ROUND, FEWEST = 64, 8

# Uses of a row's key.
DRAW, _RULE, _CHOICE, POSTERIOR = range(4)


class Wanted(NamedTuple):
  """Constraints on the next patch of each of B rows.

  Attributes:
    key_B: key of the row's draws; draw i of a row depends on this key and i alone.
    power_B: s, the power to which the race raises the draws' law.
    draw_power_B: s of the draws themselves; above 1 only for heads that read the temperature. The
      text's 1/T is the product of both.
    limit_B: N, the maximum number of draws that a rule sees.
    attempts_B: the maximum number of draws, including those that do not begin with the tail.
    tail_BK, length_B: tokens that the patch must begin with, and their number.
    active_B: whether the row takes a patch; not if its text has ended.
  """

  key_B: jax.Array
  power_B: jax.Array
  draw_power_B: jax.Array
  limit_B: jax.Array
  attempts_B: jax.Array
  tail_BK: jax.Array
  length_B: jax.Array
  active_B: jax.Array


class Candidate(NamedTuple):
  """A patch's tokens, and the latent that they were decoded from if the model reads latents."""

  token_K: jax.Array
  latent_Z: jax.Array | None


class Choice(NamedTuple):
  """The next patch of each of B rows, and the draws that it took.

  Attributes:
    patch: the patch.
    settled_B: whether the rule settled it; otherwise the draws ended first, and the
      chooser took one of them.
    drawn_B: number of candidates drawn.
    agreed_B: number of drawn candidates that begin with the complete tail.
    seen_B: number of agreeing candidates that the rule saw before it settled.
    longest_B: the most tokens of the tail that a candidate begins with.
  """

  patch: Candidate
  settled_B: jax.Array
  drawn_B: jax.Array
  agreed_B: jax.Array
  seen_B: jax.Array
  longest_B: jax.Array


class _Pool(NamedTuple):
  """Draws that begin with their row's tail, in order, and the rule's progress on them.

  Attributes:
    buffer: candidates [B, N, ...], of which the first count_B are set.
    drawn_B, agreed_B, seen_B: see `Choice`.
    best, longest_B: the candidate that matches most tokens of its tail, and their number.
    rounds: rounds taken so far.
  """

  buffer: Candidate
  count_B: jax.Array
  drawn_B: jax.Array
  agreed_B: jax.Array
  seen_B: jax.Array
  progress: rules.Progress
  best: Candidate
  longest_B: jax.Array
  rounds: jax.Array


def keys_of(key_B: jax.Array, use: int, number_B: jax.Array) -> jax.Array:
  """Returns a key for each row, for one of the uses of randomness and a number."""
  return jax.vmap(lambda key, number: jax.random.fold_in(jax.random.fold_in(key, use), number))(
    key_B, number_B
  )


def round_sizes(rows: int, least: int, most: int) -> list[int]:
  """Returns the number of candidates of each round, of all rows together; the last repeats.

  The first round has about as many as a confident model needs; each further one doubles.

  Args:
    least, most: the fewest and the most draws of a row.
  """
  largest = min(max(ROUND, rows), rows * most)
  sizes = [min(max(rows * least, FEWEST), largest)]
  while sizes[-1] < largest:
    sizes.append(min(2 * sizes[-1], largest))
  return sizes


def _at(tree: Candidate, index: Any) -> Candidate:
  return jax.tree.map(lambda x: x[index], tree)


@dataclasses.dataclass(frozen=True)
class _Rounds:
  """Rounds of draws for a batch; settled rows take no further draws.

  Attributes:
    wanted, draw, rule, slots: see `choose`.
    uniform_BN: a number in [0, 1) for each draw, which the rule may use.
  """

  wanted: Wanted
  draw: Callable[[jax.Array, jax.Array], Candidate]
  rule: rules.Rule
  slots: int
  uniform_BN: jax.Array

  @property
  def _rows_B(self) -> jax.Array:
    return jnp.arange(len(self.wanted.length_B))

  def start(self) -> _Pool:
    """Returns a pool without candidates."""
    batch, zeros_B = len(self.wanted.length_B), jnp.zeros_like(self.wanted.length_B)
    candidate = jax.eval_shape(self.draw, self._rows_B, self._rows_B)
    empty = jax.tree.map(lambda x: jnp.zeros((batch, self.slots, *x.shape[1:]), x.dtype), candidate)
    return _Pool(
      buffer=empty,
      count_B=zeros_B,
      drawn_B=zeros_B,
      agreed_B=zeros_B,
      seen_B=zeros_B,
      progress=rules.Progress.start(batch),
      best=_at(empty, (self._rows_B, 0)),
      longest_B=zeros_B - 1,
      rounds=jnp.int32(0),
    )

  def open_rows(self, pool: _Pool) -> jax.Array:
    """Returns which rows take further draws, bool [B]."""
    wanted = self.wanted
    below_limits_B = (pool.drawn_B < wanted.attempts_B) & (pool.count_B < wanted.limit_B)
    return wanted.active_B & ~pool.progress.settled_B & below_limits_B

  def _spread(self, pool: _Pool, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Spreads `size` draws over the open rows; returns their rows, numbers and validity, [S]."""
    open_B = self.open_rows(pool)
    order_B, slot_S = jnp.argsort(~open_B), jnp.arange(size)
    count = jnp.maximum(jnp.sum(open_B), 1)
    row_S = order_B[slot_S % count]
    turn_S = slot_S // count
    number_S = pool.drawn_B[row_S] + turn_S
    is_valid_S = open_B[row_S] & (number_S < self.wanted.attempts_B[row_S])
    is_valid_S &= turn_S < (self.wanted.limit_B - pool.count_B)[row_S]
    return row_S, number_S, is_valid_S

  def _matched(self, row_S: jax.Array, token_SK: jax.Array) -> jax.Array:
    """Returns how many tokens of its row's tail each candidate begins with, int [S]."""
    tail_SK, length_S = self.wanted.tail_BK[row_S], self.wanted.length_B[row_S]
    in_tail_SK = jnp.arange(tail_SK.shape[1])[None] < length_S[:, None]
    return jnp.sum(jnp.cumprod((token_SK == tail_SK) & in_tail_SK, axis=1), axis=1)

  def fill(self, pool: _Pool, size: int) -> _Pool:
    """Draws `size` candidates and stores those that begin with their row's tail."""
    row_S, number_S, is_valid_S = self._spread(pool, size)
    drawn = self.draw(row_S, number_S)
    matched_S = self._matched(row_S, drawn.token_K)
    agrees_S = is_valid_S & (matched_S == self.wanted.length_B[row_S])
    is_valid_SB = (row_S[:, None] == self._rows_B[None]) & is_valid_S[:, None]
    agrees_SB = is_valid_SB & agrees_S[:, None]
    agreed_B = jnp.sum(agrees_SB, axis=0)
    slot_S = pool.count_B[row_S] + jnp.cumsum(agrees_SB, axis=0)[jnp.arange(size), row_S] - 1
    slot_S = jnp.where(agrees_S, slot_S, self.slots)  # Out of bounds: dropped.
    best, longest_B = _better(pool, drawn, jnp.where(is_valid_SB, matched_S[:, None], -1))
    return pool._replace(
      buffer=jax.tree.map(
        lambda x, new: x.at[row_S, slot_S].set(new, mode="drop"), pool.buffer, drawn
      ),
      count_B=jnp.minimum(pool.count_B + agreed_B, self.wanted.limit_B),
      drawn_B=pool.drawn_B + jnp.sum(is_valid_SB, axis=0),
      agreed_B=pool.agreed_B + agreed_B,
      best=best,
      longest_B=longest_B,
      rounds=pool.rounds + 1,
    )

  def unseen_rows(self, pool: _Pool) -> jax.Array:
    """Returns which unsettled rows have a draw that the rule has not seen, bool [B]."""
    return (pool.seen_B < pool.count_B) & ~pool.progress.settled_B

  def look(self, pool: _Pool) -> _Pool:
    """Applies the rule to the next unseen draw of every row that has one."""
    new_B, index_B = self.unseen_rows(pool), jnp.minimum(pool.seen_B, self.slots - 1)
    token_BNK, rows_B = pool.buffer.token_K, self._rows_B
    same_BN = jnp.all(token_BNK == token_BNK[rows_B, index_B][:, None], axis=-1)
    same_BN &= jnp.arange(self.slots)[None] <= index_B[:, None]
    uniform_B = self.uniform_BN[rows_B, index_B]
    draw = rules.Draw(index_B, same_BN, self.wanted.power_B, uniform_B)
    after = self.rule(pool.progress, draw)
    progress = jax.tree.map(lambda x, new: jnp.where(new_B, new, x), pool.progress, after)
    return pool._replace(seen_B=pool.seen_B + new_B, progress=progress)

  def advance(self, pool: _Pool, sizes: list[int]) -> _Pool:
    """Takes one round: fills the pool, then applies the rule to all unseen draws."""
    number = jnp.minimum(pool.rounds, len(sizes) - 1)
    fills = [functools.partial(self.fill, size=size) for size in sizes]
    pool = jax.lax.switch(number, fills, pool)
    return jax.lax.while_loop(lambda pool: jnp.any(self.unseen_rows(pool)), self.look, pool)


def _better(pool: _Pool, drawn: Candidate, matched_SB: jax.Array) -> tuple[Candidate, jax.Array]:
  """Returns each row's candidate with the longest match of its tail, and that length, int [B].

  Args:
    matched_SB: tokens of the row's tail that a new draw begins with; -1 for other rows' draws.
  """
  longest_B, number_B = jnp.max(matched_SB, axis=0), jnp.argmax(matched_SB, axis=0)
  better_B1 = (longest_B > pool.longest_B)[:, None]
  best = jax.tree.map(lambda old, new: jnp.where(better_B1, new[number_B], old), pool.best, drawn)
  return best, jnp.maximum(pool.longest_B, longest_B)


def _uniforms(wanted: Wanted, slots: int) -> jax.Array:
  """Returns the rule's numbers in [0, 1), [B, N]; zeros where no row has a second stage."""
  zeros_B = jnp.zeros_like(wanted.length_B)

  def draw_uniforms() -> jax.Array:
    key_B = keys_of(wanted.key_B, _RULE, zeros_B)
    return jax.vmap(lambda key: jax.random.uniform(key, (slots,)))(key_B)

  return jax.lax.cond(
    jnp.any(wanted.power_B != jnp.floor(wanted.power_B)),
    draw_uniforms,
    lambda: jnp.zeros((len(zeros_B), slots)),
  )


def _chosen(pool: _Pool, wanted: Wanted, chooser: choosers.Chooser) -> jax.Array:
  """Returns the index of each row's chosen draw, int [B]: the rule's, else the chooser's."""
  star_B, settled_B = pool.progress.star_B, pool.progress.settled_B

  def by_chooser() -> jax.Array:
    has_draw_BN = jnp.arange(pool.buffer.token_K.shape[1])[None] < pool.count_B[:, None]
    key_B = keys_of(wanted.key_B, _CHOICE, jnp.zeros_like(pool.count_B))
    return chooser(pool.buffer.token_K, has_draw_BN, wanted.power_B, key_B)

  needs_chooser_B = wanted.active_B & ~settled_B & (pool.count_B > 0)
  chosen_B = jax.lax.cond(jnp.any(needs_chooser_B), by_chooser, lambda: star_B)
  return jnp.where(settled_B, star_B, chosen_B)


def choose(
  wanted: Wanted,
  draw: Callable[[jax.Array, jax.Array], Candidate],
  rule: rules.Rule,
  chooser: choosers.Chooser,
  slots: int,
  sizes: list[int],
) -> Choice:
  """Returns a patch for each active row; the values of other rows are undefined.

  Each round draws for the unsettled rows only, so that no row waits for the draws of another and
  a settled row costs nothing.

  Args:
    draw: (rows [S], numbers of their draws [S]) -> candidates [S, ...].
    chooser: chooses one of a row's draws if they end before the rule settles.
    slots: the largest N of a row.
    sizes: see `round_sizes`.
  """
  rounds = _Rounds(wanted, draw, rule, slots, _uniforms(wanted, slots))
  pool = jax.lax.while_loop(
    lambda pool: jnp.any(rounds.open_rows(pool)),
    lambda pool: rounds.advance(pool, sizes),
    rounds.start(),
  )
  rows_B = jnp.arange(len(pool.count_B))
  patch = _at(pool.buffer, (rows_B, _chosen(pool, wanted, chooser)))
  is_empty_B1 = (pool.count_B == 0)[:, None]
  patch = jax.tree.map(lambda x, best: jnp.where(is_empty_B1, best, x), patch, pool.best)
  settled_B = pool.progress.settled_B
  return Choice(patch, settled_B, pool.drawn_B, pool.agreed_B, pool.seen_B, pool.longest_B)


def choose_from(
  pool_BNK: jax.Array,
  power_B: jax.Array,
  key_B: jax.Array,
  rule: rules.Rule,
  chooser: choosers.Chooser,
  slots: int,
) -> Choice:
  """Returns the choice among the first `slots` of each row's draws [B, N, K], in their order."""
  rows, _, size = pool_BNK.shape
  ones_B = jnp.ones(rows, jnp.int32)
  wanted = Wanted(
    key_B=key_B,
    power_B=power_B,
    draw_power_B=jnp.ones(rows),
    limit_B=slots * ones_B,
    attempts_B=slots * ones_B,
    tail_BK=jnp.zeros((rows, size), jnp.int32),
    length_B=0 * ones_B,
    active_B=ones_B > 0,
  )

  def draw(row_S, number_S):
    return Candidate(pool_BNK[row_S, number_S], None)

  return choose(wanted, draw, rule, chooser, slots, [rows])
