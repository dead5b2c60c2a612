"""Claims about branches: computed all at once, they equal recomputing each from its text."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import backbone, layers, memory

SIZES = config.Backbone(layers=2, width=16, ffn=24, heads=4, kv_heads=2, init="fan_in")
VOCAB, PATCH, PATCHES, STEPS = 50, 2, 6, 3


@pytest.fixture(scope="module")
def model():
  return backbone.Backbone(SIZES, VOCAB)


@pytest.fixture(scope="module")
def token_BPK():
  return jax.random.randint(jax.random.key(1), (2, PATCHES, PATCH), 0, VOCAB)


@pytest.fixture(scope="module")
def params(model, token_BPK):
  return model.init(jax.random.key(0), token_BPK)["params"]


@pytest.mark.parametrize("chunk", [memory.BRANCH_CHUNK, 4])
@pytest.mark.parametrize("branches", [PATCHES, PATCHES - 2])
def test_branches_equal_recomputing_each(
  branches, chunk, model, params, token_BPK, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(memory, "BRANCH_CHUNK", chunk)
  apply = jax.jit(lambda *args: layers.apply(model, params, *args))
  cache = memory.Cache.empty(PATCHES)
  _, cache = apply(token_BPK, None, cache)
  cache = memory.Branches.of(cache, branches)
  step_BPK = jax.random.randint(jax.random.key(2), (STEPS, 2, branches, PATCH), 0, VOCAB)
  for step in range(STEPS):
    hidden_BPD, cache = apply(step_BPK[step], None, cache)
    for start in range(branches):
      own_BJK = jnp.moveaxis(step_BPK[: step + 1, :, start], 0, 1)
      text_BPK = jnp.concatenate([token_BPK[:, : start + 1], own_BJK], axis=1)
      expected_BPD, _ = apply(text_BPK)
      np.testing.assert_allclose(hidden_BPD[:, start], expected_BPD[:, -1], atol=2e-5)


def test_a_branch_does_not_see_the_text_after_its_start(model, params, token_BPK):
  def first_step(token_BPK):
    cache = memory.Cache.empty(PATCHES)
    _, cache = layers.apply(model, params, token_BPK, None, cache)
    branches = memory.Branches.of(cache, PATCHES)
    return layers.apply(model, params, jnp.ones((2, PATCHES, PATCH), int), None, branches)[0]

  before, after = first_step(token_BPK), first_step(token_BPK.at[:, 3].add(1))
  differs_P = np.abs(before - after).max(axis=(0, 2)) > 1e-4
  np.testing.assert_array_equal(differs_P, [False] * 3 + [True] * 3)
