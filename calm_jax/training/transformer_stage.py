"""The baseline for the loop: tokens -> logits of the next token."""

from typing import NamedTuple

import jax
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import layers, memory, transformer
from calm_jax.objectives import brier, vocabulary
from calm_jax.parallel import mesh
from calm_jax.training import stages

# Positions whose logits [V] are in memory at once in evaluation.
LAW_CHUNK = 1024


class Law(NamedTuple):
  """What evaluation needs of the laws of next tokens, [...] each.

  Attributes:
    log_target: log probability of the text's token, nats.
    square: Σ p², the probability that two draws are equal.
    draw: a token drawn from the law. drawn: its probability.
  """

  log_target: jax.Array
  square: jax.Array
  draw: jax.Array
  drawn: jax.Array


def build(run: config.TransformerRun, vocab_size: int) -> stages.Stage:
  """Returns the baseline's stage."""
  dtype = jnp.dtype(run.training.compute_dtype)
  model = transformer.Transformer(run.model, vocab_size, dtype, run.execution)

  def hidden(params, token_BS, known=None):
    return layers.apply(model, params, token_BS, known, method="hidden")

  def logits(params, hidden_D):
    return layers.apply(model, params, hidden_D, method="logits")

  def loss(params, frozen, batch, key):
    token_BS = batch["tokens"]
    hidden_BSD, _ = hidden(params, mesh.constrain(token_BS, "batch", "position"))
    target_BS = stages.next_position(token_BS)
    table_VD = params["out"]["kernel"].T
    known_BS = stages.known(target_BS)
    found = vocabulary.cross_entropy(table_VD, hidden_BSD, target_BS, known_BS / known_BS.sum())
    metrics = {
      "tokens": jnp.float32(token_BS[:, 1:].size),
      "patches_per_token": jnp.float32(1),
    }
    return found.loss, metrics

  def laws(params, hidden_BSD, target_BS, key_B):
    """The law after each position, a chunk of positions at a time."""
    key_BS = jax.vmap(lambda key: jax.random.split(key, target_BS.shape[1]))(key_B)

    def law(log_p_V, target, key):
      draw = jax.random.categorical(key, log_p_V)
      return Law(
        log_p_V[target],
        jnp.sum(jnp.exp(2 * log_p_V)),
        draw.astype(jnp.int32),
        jnp.exp(log_p_V[draw]),
      )

    def some(positions):
      hidden_SD, target_S, key_S = positions
      log_p_SV = jax.nn.log_softmax(logits(params, hidden_SD))
      log_p_SV = mesh.constrain_last(log_p_SV, "position", "width")
      return jax.vmap(law)(log_p_SV, target_S, key_S)

    chunk = max(1, LAW_CHUNK // mesh.own_examples(len(key_B)))

    def one(*example):
      return layers.in_chunks(some, example, chunk)

    return mesh.examples(one)(hidden_BSD, target_BS, key_BS)

  def evaluate(params, frozen, batch, key):
    token_BS, key_B = batch["tokens"], stages.example_keys(key, batch["index"])
    count = token_BS.shape[1] - 1
    cache = memory.Cache.empty(count)
    hidden_BSD, known = hidden(params, token_BS[:, :-1], cache)
    law = laws(params, hidden_BSD, token_BS[:, 1:], key_B)
    cross_entropy_BS = -law.log_target

    starts = count - brier.ORDERS + 1
    right_BS = jnp.exp(law.log_target)
    accuracies = [right_BS[:, n : n + starts, None] for n in range(brier.ORDERS)]
    accuracy_BSn = brier.chain(accuracies, [share_BS1[..., 0] for share_BS1 in accuracies[:-1]])

    law = jax.tree.map(lambda x: x[:, :starts], law)
    within, whole = [law.square[..., None]], []
    known = memory.Branches.of(known, starts)
    for n in range(1, brier.ORDERS):
      whole.append(law.drawn)
      hidden_BSD, known = hidden(params, law.draw, known)
      key_B = stages.other_keys(key_B, n)
      law = laws(params, hidden_BSD, law.draw, key_B)
      within.append(law.square[..., None])
    collision_BSn = brier.chain(within, whole)
    return {
      "accuracy": jnp.mean(accuracy_BSn, axis=1),
      "collision": jnp.mean(collision_BSn, axis=1),
      "cross_entropy": jnp.mean(cross_entropy_BS, axis=1),
    }

  def summarize(scores):
    result = brier.summary(scores["accuracy"], scores["collision"])
    return result | stages.with_stderr(scores, "cross_entropy")

  return stages.Stage(model.initial, loss, evaluate, summarize, frozen={})
