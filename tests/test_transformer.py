"""Claims about the baseline: its BrierLM is exact in expectation, its loss the cross-entropy."""

import itertools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import layers, transformer
from calm_jax.running import untrained
from calm_jax.stages import transformer as transformer_stage

VOCAB, TOKENS = 3, 7
RUN = transformer_stage.Run(
  model=config.Transformer(layers=1, width=8, ffn=16, heads=2, kv_heads=1, init="fan_in"),
  training=config.Training(compute_dtype="float32"),
)


@pytest.fixture(scope="module")
def params():
  model = transformer.Transformer(RUN.model, VOCAB)
  params = model.initial(jax.random.key(0))
  return jax.tree.map(
    lambda x: 3 * x if x.ndim > 1 else x, params
  )  # A distribution far from uniform.


@jax.jit
def _logits(params, token_S: jax.Array) -> jax.Array:
  return layers.apply(transformer.Transformer(RUN.model, VOCAB), params, token_S[None])[0]


def next_distribution(params, text: tuple[int, ...]) -> np.ndarray:
  return np.asarray(jax.nn.softmax(_logits(params, jnp.array(text))[-1]), np.float64)


def test_brier_of_the_baseline_is_exact_accuracy_and_an_unbiased_collision(params):
  """Sums over all continuations of 4 tokens from a vocabulary of 3, by brute force."""
  stage = untrained.functions(RUN, {}, VOCAB, untrained.abstract)
  text = tuple(int(x) for x in jax.random.randint(jax.random.key(1), (TOKENS,), 0, VOCAB))
  cache = {}

  def cached_distribution(prefix):
    if prefix not in cache:
      cache[prefix] = next_distribution(params, prefix)
    return cache[prefix]

  starts = range(1, TOKENS - 3)
  accuracy, collision = np.zeros((2, len(starts), 4))
  for row, start in enumerate(starts):
    right = 1.0
    for n in range(4):
      right *= cached_distribution(text[: start + n])[text[start + n]]
      accuracy[row, n] = right
      for gram in itertools.product(range(VOCAB), repeat=n + 1):
        chances = [cached_distribution(text[:start] + gram[:j])[gram[j]] for j in range(n + 1)]
        collision[row, n] += np.prod(chances) ** 2
  rows = 2000
  batch = {
    "tokens": jnp.broadcast_to(jnp.array(text), (rows, TOKENS)),
    "index": jnp.arange(rows),
  }
  scores = jax.jit(stage.evaluate)(params, {}, batch, jax.random.key(2))
  np.testing.assert_allclose(scores["accuracy"][0], accuracy.mean(axis=0), rtol=1e-4)
  estimates = np.asarray(scores["collision"])
  error = estimates.std(axis=0) / np.sqrt(rows)
  assert np.all(np.abs(estimates.mean(axis=0) - collision.mean(axis=0)) < 4 * error + 1e-5)
  assert error[0] < 1e-6 < error[3]  # The last token's collision is exact; the path is drawn.


def test_the_loss_is_the_cross_entropy_of_the_next_token(params):
  stage = untrained.functions(RUN, {}, VOCAB, untrained.abstract)
  text = (0, 2, 1, 1)
  value, metrics = stage.loss(
    params, {}, {"tokens": jnp.array([text]), "index": jnp.array([0])}, jax.random.key(0)
  )
  expected = [-np.log(next_distribution(params, text[:i])[text[i]]) for i in (1, 2, 3)]
  assert float(value) == pytest.approx(np.mean(expected), rel=1e-5)
  assert metrics["tokens"] == 3
