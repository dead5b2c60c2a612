"""A sequence of draws -> the accepted one: samplers as state machines, one function per rule.

A rule sees a row's draws in order, and decides after each whether the outcome is settled. The
decision depends on nothing else, so the distribution of the result does not depend on how many
draws are made at once.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp


class Draw(NamedTuple):
  """The next draw of each row, in a batch of B rows.

  Attributes:
    index_B: its number among the row's draws, from 0.
    same_BN: which of the row's draws up to it, itself included, are equal to it.
    power_B: s = 1/T = n + a, with integer n and 0 <= a < 1.
    uniform_B: a random number in [0, 1), independent for each draw.
  """

  index_B: jax.Array
  same_BN: jax.Array
  power_B: jax.Array
  uniform_B: jax.Array


class Progress(NamedTuple):
  """The progress of a rule in each row.

  Attributes:
    begin_B: the first draw that counts.
    star_B: x*, the draw that may be accepted.
    equal_B: number of draws equal to x*, itself included: n once the first stage is passed,
      0 before there is an x*.
    missed_B: number of draws of the second stage that differ from x*.
    settled_B: whether x* is accepted.
  """

  begin_B: jax.Array
  star_B: jax.Array
  equal_B: jax.Array
  missed_B: jax.Array
  settled_B: jax.Array

  @classmethod
  def start(cls, batch: int) -> "Progress":
    zeros_B = jnp.zeros((batch,), jnp.int32)
    return cls(zeros_B, zeros_B, zeros_B, zeros_B, jnp.zeros((batch,), bool))


Rule = Callable[[Progress, Draw], Progress]


def _at(x_BN: jax.Array, index_B: jax.Array) -> jax.Array:
  return jnp.take_along_axis(x_BN, index_B[:, None], axis=1)[:, 0]


def _second_stage(
  progress: Progress, draw: Draw, star_B: jax.Array, equal_B: jax.Array
) -> Progress:
  """Returns the progress after a draw, given x* and its count of the first stage.

  Accepts x* with probability P(x*)^a: a draw equal to x* accepts it; the i-th that differs
  rejects it with probability a/i, and the first stage starts again.
  """
  integer_B = jnp.floor(draw.power_B).astype(jnp.int32)
  fraction_B = draw.power_B - integer_B
  in_second_B = progress.equal_B >= integer_B  # Whether this draw belongs to the second stage.
  star_B = jnp.where(in_second_B, progress.star_B, star_B)
  hit_B = in_second_B & _at(draw.same_BN, star_B)
  missed_B = jnp.where(in_second_B & ~hit_B, progress.missed_B + 1, 0)
  rejected_B = (missed_B > 0) & (draw.uniform_B * missed_B < fraction_B)
  equal_B = jnp.where(rejected_B, 0, jnp.where(in_second_B, progress.equal_B, equal_B))
  return Progress(
    begin_B=jnp.where(rejected_B, draw.index_B + 1, progress.begin_B),
    star_B=star_B,
    equal_B=equal_B,
    missed_B=jnp.where(rejected_B, 0, missed_B),
    settled_B=progress.settled_B | hit_B | ((fraction_B == 0) & (equal_B >= integer_B)),
  )


def exact(progress: Progress, draw: Draw) -> Progress:
  """Settles on x with probability P(x)^(1/T) / Σ P^(1/T): n equal draws, then the second stage.

  A draw that differs from the first of its n starts again at once, whereas the paper makes
  all n first. Expected draws, with S_j = Σ P^j: (1 + S_1 + ... + S_(n−1) + Σ P^(s−1)) / S_s,
  where the last summand in the bracket is there only if a > 0.

  Source: CALM (arXiv:2510.27688), algorithm 1.
  """
  has_star_B = progress.equal_B > 0
  equal_B = jnp.where(
    has_star_B & _at(draw.same_BN, progress.star_B), progress.equal_B + 1, ~has_star_B
  )
  star_B = jnp.where(has_star_B, progress.star_B, draw.index_B)
  return _second_stage(progress, draw, star_B, equal_B.astype(jnp.int32))


def first(progress: Progress, draw: Draw) -> Progress:
  """Settles on the first patch that is drawn n times, then the second stage.

  It ends after a few draws if the model is confident. Its distribution tends to
  P^(1/T) / Σ P^(1/T) if all patches are rare; likely patches are less likely than that.
  """
  counted_BN = draw.same_BN & (jnp.arange(draw.same_BN.shape[1])[None] >= progress.begin_B[:, None])
  return _second_stage(progress, draw, draw.index_B, jnp.sum(counted_BN, axis=1, dtype=jnp.int32))


def none(progress: Progress, draw: Draw) -> Progress:
  """Never settles below temperature 1, so that a chooser decides from all N draws."""
  return progress._replace(star_B=draw.index_B, settled_B=progress.settled_B | (draw.power_B == 1))


# Single draws are at the text's temperature, if the model has a head that reads it. What is missing
# below the lowest temperature of that head is raced for as by `first`.
DIRECT = "direct"
RULES: dict[str, Rule] = {"exact": exact, "first": first, "none": none, DIRECT: first}
