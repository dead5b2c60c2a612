"""Claims about the cross-entropy over a vocabulary: in chunks it equals the plain one."""

import functools
import math
import re

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import config
from calm_jax.kernels import cross_entropy
from calm_jax.parallel import mesh as mesh_lib

B, S, E, V = 4, 6, 8, 40


def arrays(vocab_size: int = V) -> tuple[jax.Array, ...]:
  """Returns a table, features, tokens and weights."""
  rng = np.random.default_rng(0)
  table_VE = jnp.array(rng.normal(size=(vocab_size, E)), jnp.float32)
  feature_BSE = jnp.array(rng.normal(size=(B, S, E)), jnp.float32)
  token_BS = jnp.array(rng.integers(0, vocab_size, (B, S)))
  weight_BS = jnp.array(rng.uniform(size=(B, S)), jnp.float32)
  return table_VE, feature_BSE, token_BS, weight_BS


def scores_and_gradients(function, *arrays):
  """Returns scores, and the gradients of three times their loss."""

  def loss(table_VE, feature_BSE):
    scores = function(table_VE, feature_BSE, *arrays[2:])
    return 3 * scores.loss, scores

  return jax.value_and_grad(loss, (0, 1), has_aux=True)(*arrays[:2])


def assert_close(outputs, expected):
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, outputs, expected)


@pytest.mark.parametrize("form", [cross_entropy.plain, cross_entropy.scores])
def test_three_even_logits_cost_log_three_nats(form):
  scores = form(jnp.zeros((3, 2)), jnp.ones((1, 1, 2)), jnp.array([[1]]), jnp.ones((1, 1)))
  np.testing.assert_allclose([scores.loss, scores.cross_entropy[0, 0]], np.log(3), rtol=1e-6)
  assert scores.right == 1


def test_the_plain_scores_are_those_of_numpy():
  table_VE, feature_BSE, token_BS, weight_BS = map(np.asarray, arrays())
  logits_BSV = np.einsum("BSE,VE->BSV", feature_BSE, table_VE, dtype=np.float64)
  p_BSV = np.exp(logits_BSV) / np.exp(logits_BSV).sum(-1, keepdims=True)
  nats_BS = -np.log(np.take_along_axis(p_BSV, token_BS[..., None], axis=-1)[..., 0])
  scores = cross_entropy.plain(*arrays())
  np.testing.assert_allclose(scores.cross_entropy, nats_BS, rtol=1e-5)
  np.testing.assert_allclose(scores.loss, (nats_BS * weight_BS).sum(), rtol=1e-5)
  np.testing.assert_array_equal(scores.right, logits_BSV.argmax(-1) == token_BS)


@pytest.mark.parametrize("chunk", [1, 5, 24, 1024])
def test_chunks_change_neither_scores_nor_gradients(monkeypatch, chunk: int):
  monkeypatch.setattr(cross_entropy, "CPU_CHUNK", chunk)
  outputs = scores_and_gradients(cross_entropy.scores, *arrays())
  assert_close(outputs, scores_and_gradients(cross_entropy.plain, *arrays()))


def test_no_array_holds_the_logits_of_all_positions(monkeypatch):
  monkeypatch.setattr(cross_entropy, "CPU_CHUNK", 4)
  loss = jax.grad(lambda *arrays: cross_entropy.scores(*arrays).loss, (0, 1))
  shapes = re.findall(r"tensor<((?:\d+x)+)", jax.jit(loss).lower(*arrays()).as_text())
  sizes = {math.prod(map(int, shape.rstrip("x").split("x"))) for shape in shapes}
  assert max(sizes) == V * E and 4 * V in sizes


@pytest.mark.parametrize("vocab_size", [V, V + 1], ids=["even", "uneven"])
@pytest.mark.parametrize(
  "sizes",
  [config.Mesh(data=2, fsdp=2, tensor=2), config.Mesh(fsdp=2, sequence=2, tensor=2)],
  ids=["data", "sequence"],
)
def test_every_mesh_computes_the_same(monkeypatch, sizes: config.Mesh, vocab_size: int):
  monkeypatch.setattr(cross_entropy, "CPU_CHUNK", 4)
  expected = scores_and_gradients(cross_entropy.plain, *arrays(vocab_size))
  with jax.set_mesh(mesh_lib.build(sizes)):
    both = jax.jit(functools.partial(scores_and_gradients, cross_entropy.scores))
    outputs = both(*arrays(vocab_size))
  assert_close(outputs, expected)


def test_every_platform_reads_the_same_target_logit():
  logits_sV = jax.random.normal(jax.random.key(0), (5, 7))
  token_s = jnp.array([0, 6, 3, 3, 1])
  expected = np.asarray(logits_sV)[np.arange(5), np.asarray(token_s)]
  np.testing.assert_array_equal(cross_entropy._masked_sum(logits_sV, token_s), expected)
  np.testing.assert_array_equal(cross_entropy._gathered(logits_sV, token_s), expected)
