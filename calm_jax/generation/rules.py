"""Draws, one after the other -> the one that is taken: samplers as state machines.

A rule sees a row's draws in their order and says after each whether the outcome is
settled. What it says depends on nothing else, so that the law is the same however
many draws are made at once.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp


class Draw(NamedTuple):
  """The next draw of each row, in a batch of B rows.

  Attributes:
    index_B: its number among the row's draws, from 0.
    same_BN: the row's draws that it equals, itself and those before it.
    power_B: s = 1/T = n + a, n whole, 0 <= a < 1.
    uniform_B: a number in [0, 1) of its own.
  """

  index_B: jax.Array
  same_BN: jax.Array
  power_B: jax.Array
  uniform_B: jax.Array


class Progress(NamedTuple):
  """Where each row stands.

  Attributes:
    begin_B: the draw from which on it counts.
    star_B: the draw that may be taken. equal_B: how many it equals, itself too, n once the
      first stage is passed; 0 before there is one.
    missed_B: draws of the second stage that did not equal it.
    settled_B: whether it is taken.
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


def _second_stage(before: Progress, draw: Draw, star_B: jax.Array, equal_B: jax.Array) -> Progress:
  """Goes on after what the first stage made of a draw: accepts x* with probability P(x*)^a.

  A draw equal to x* accepts; the i-th that is not rejects with probability a/i, and
  all starts again.
  """
  whole_B = jnp.floor(draw.power_B).astype(jnp.int32)
  rest_B = draw.power_B - whole_B
  second_B = before.equal_B >= whole_B  # This draw belongs to it.
  star_B = jnp.where(second_B, before.star_B, star_B)
  hit_B = second_B & _at(draw.same_BN, star_B)
  missed_B = jnp.where(second_B & ~hit_B, before.missed_B + 1, 0)
  rejected_B = (missed_B > 0) & (draw.uniform_B * missed_B < rest_B)
  equal_B = jnp.where(rejected_B, 0, jnp.where(second_B, before.equal_B, equal_B))
  return Progress(
    begin_B=jnp.where(rejected_B, draw.index_B + 1, before.begin_B),
    star_B=star_B,
    equal_B=equal_B,
    missed_B=jnp.where(rejected_B, 0, missed_B),
    settled_B=before.settled_B | hit_B | ((rest_B == 0) & (equal_B >= whole_B)),
  )


def exact(before: Progress, draw: Draw) -> Progress:
  """Settles on x with P(x)^(1/T) / Σ P^(1/T), exactly: n equal draws, then the second stage.

  A draw that differs from the first of its n starts again at once; the paper makes
  all n first. Expected draws, with S_j = Σ P^j: (1 + S_1 + ... + S_(n−1) + Σ P^(s−1)) / S_s, the
  last summand in the bracket only where a > 0.

  Source: CALM (arXiv:2510.27688), algorithm 1.
  """
  begun_B = before.equal_B > 0
  equal_B = jnp.where(begun_B & _at(draw.same_BN, before.star_B), before.equal_B + 1, ~begun_B)
  star_B = jnp.where(begun_B, before.star_B, draw.index_B)
  return _second_stage(before, draw, star_B, equal_B.astype(jnp.int32))


def first(before: Progress, draw: Draw) -> Progress:
  """Settles on the first patch that is drawn n times, then the second stage.

  It ends by itself after a few draws where the model is sure. Its law tends to
  P^(1/T) / Σ P^(1/T) where all patches are rare; likely ones get less than that.
  """
  counted_BN = draw.same_BN & (jnp.arange(draw.same_BN.shape[1])[None] >= before.begin_B[:, None])
  return _second_stage(before, draw, draw.index_B, jnp.sum(counted_BN, axis=1, dtype=jnp.int32))


def none(before: Progress, draw: Draw) -> Progress:
  """Never settles below temperature 1: all N draws decide, by `choosers`."""
  return before._replace(star_B=draw.index_B, settled_B=before.settled_B | (draw.power_B == 1))


RULES: dict[str, Rule] = {"exact": exact, "first": first, "none": none}
