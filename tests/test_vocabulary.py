"""Claims about the cross-entropy over a vocabulary: the plain one, without its logits."""

import math
import re

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import config
from calm_jax.objectives import vocabulary
from calm_jax.parallel import mesh as mesh_lib

B, P, E, V = 4, 6, 8, 40


@pytest.fixture
def given():
  rng = np.random.default_rng(0)
  table_VE = jnp.array(rng.normal(size=(V, E)), jnp.float32)
  feature_BPE = jnp.array(rng.normal(size=(B, P, E)), jnp.float32)
  token_BP = jnp.array(rng.integers(0, V, (B, P)))
  weight_BP = jnp.array(rng.uniform(size=(B, P)), jnp.float32)
  return table_VE, feature_BPE, token_BP, weight_BP


def plain(table_VE, feature_BPE, token_BP, weight_BP):
  log_p_BPV = jax.nn.log_softmax(feature_BPE @ table_VE.T)
  return -jnp.take_along_axis(log_p_BPV, token_BP[..., None], axis=-1)[..., 0]


def test_three_even_logits_cost_log_three_nats():
  found = vocabulary.cross_entropy(
    jnp.zeros((3, 2)), jnp.ones((1, 1, 2)), jnp.array([[1]]), jnp.ones((1, 1))
  )
  np.testing.assert_allclose([found.loss, found.cross_entropy[0, 0]], np.log(3), rtol=1e-6)


@pytest.mark.parametrize("at_once", [1, 5, 24, 1024])
def test_scores_and_gradients_are_those_of_whole_logits(monkeypatch, given, at_once: int):
  monkeypatch.setattr(vocabulary, "AT_ONCE_ON_A_CPU", at_once)
  found = vocabulary.cross_entropy(*given)
  expected_BP = plain(*given)
  np.testing.assert_allclose(found.cross_entropy, expected_BP, rtol=1e-5)
  np.testing.assert_allclose(found.loss, jnp.sum(expected_BP * given[3]), rtol=1e-5)
  best_BP = jnp.argmax(given[1] @ given[0].T, axis=-1)
  np.testing.assert_array_equal(found.right, best_BP == given[2])

  def whole(table_VE, feature_BPE):
    return 3 * jnp.sum(plain(table_VE, feature_BPE, *given[2:]) * given[3])

  def ours(table_VE, feature_BPE):
    return 3 * vocabulary.cross_entropy(table_VE, feature_BPE, *given[2:]).loss

  gradients = (jax.grad(f, (0, 1))(*given[:2]) for f in (ours, whole))
  for one, other in zip(*gradients, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_no_array_holds_the_logits_of_all_positions(monkeypatch, given):
  monkeypatch.setattr(vocabulary, "AT_ONCE_ON_A_CPU", 4)
  loss = jax.grad(lambda *x: vocabulary.cross_entropy(*x).loss, (0, 1))
  shapes = re.findall(r"tensor<((?:\d+x)+)", jax.jit(loss).lower(*given).as_text())
  sizes = {math.prod(map(int, shape.rstrip("x").split("x"))) for shape in shapes}
  assert max(sizes) == V * E and 4 * V in sizes


@pytest.mark.parametrize(
  "sizes",
  [config.Mesh(data=2, fsdp=2, tensor=2), config.Mesh(fsdp=2, sequence=2, tensor=2)],
  ids=["data", "sequence"],
)
def test_every_mesh_computes_the_same(monkeypatch, given, sizes: config.Mesh):
  monkeypatch.setattr(vocabulary, "AT_ONCE_ON_A_CPU", 4)

  def scores_and_gradients(*given):
    def loss(table_VE, feature_BPE):
      found = vocabulary.cross_entropy(table_VE, feature_BPE, *given[2:])
      return found.loss, found

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(*given[:2])

  expected = jax.jit(scores_and_gradients)(*given)
  with jax.set_mesh(mesh_lib.build(sizes)):
    found = jax.jit(scores_and_gradients)(*given)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def test_every_platform_picks_the_same_logit():
  logits_nV = jax.random.normal(jax.random.key(0), (5, 7))
  token_n = jnp.array([0, 6, 3, 3, 1])
  expected = np.asarray(logits_nV)[np.arange(5), np.asarray(token_n)]
  np.testing.assert_array_equal(vocabulary._summed(logits_nV, token_n), expected)
  np.testing.assert_array_equal(vocabulary._gathered(logits_nV, token_n), expected)
