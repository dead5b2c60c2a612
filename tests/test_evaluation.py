"""Claims about evaluation: each held-out block is scored once."""

import numpy as np
from jax import numpy as jnp

from calm_jax.data import pipeline
from calm_jax.data import store as store_lib
from calm_jax.training import evaluation
from calm_jax.training import stage as stage_lib


def stage():
  """Returns a stage whose scores are the index and the first token of a block."""

  def evaluate(params, frozen, batch, key):
    return {"index": batch["index"] + params, "first": batch["tokens"][:, 0]}

  return stage_lib.Stage(
    init=lambda key: key,
    loss=lambda *_: (jnp.float32(0), {}),
    evaluate=evaluate,
    summarize=lambda scores: {name: value.tolist() for name, value in scores.items()},
    frozen={},
  )


def test_each_block_is_scored_once_and_the_counts_are_reported(tokens: str):
  store = store_lib.TokenStore.open(tokens)
  count = store.num_tokens("heldout") // 32
  for batch, limit, expected in ((4, 0, count), (4, 5, 5), (7, 7, 7), (100, 3, 3)):
    figures = evaluation.Evaluator(stage(), store, 32, batch, limit, seed=3)(jnp.int32(10))
    np.testing.assert_array_equal(figures["index"], 10 + np.arange(expected))
    blocks = pipeline.heldout_tokens(store, 32, limit)
    np.testing.assert_array_equal(figures["first"], blocks[:, 0])
    counts = {name: figures[name] for name in ("context_tokens", "blocks", "tokens", "seed")}
    assert counts == {
      "context_tokens": 32, "blocks": expected, "tokens": 32 * expected, "seed": 3,
    }  # fmt: skip
