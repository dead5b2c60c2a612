"""Claims about the Transformer over patches: it is causal, and a cache changes no number."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import backbone, layers, llama, memory

SIZES = config.Backbone(layers=2, width=16, ffn=24, heads=4, kv_heads=2, init="fan_in")
VOCAB, PATCH, PATCHES = 50, 2, 7


@pytest.fixture(scope="module")
def model():
  return backbone.Backbone(SIZES, VOCAB)


@pytest.fixture(scope="module")
def token_BPK():
  return jax.random.randint(jax.random.key(1), (3, PATCHES, PATCH), 0, VOCAB)


@pytest.fixture(scope="module")
def params(model, token_BPK):
  return model.init(jax.random.key(0), token_BPK)["params"]


def test_no_gradient_flows_from_a_hidden_state_to_later_patches(params):
  """Each token has its own row of the table, so the gradient per row is that per position."""
  token_BPK = jnp.arange(PATCHES * PATCH).reshape(1, PATCHES, PATCH)
  model = backbone.Backbone(SIZES, token_BPK.size)
  table_VD = params["embed"]["embedding"][: token_BPK.size]

  def hidden_sum(table_VD, patch):
    changed = {**params, "embed": {"embedding": table_VD}}
    hidden_BPD, _ = layers.apply(model, changed, token_BPK)
    return jnp.sum(jnp.sin(hidden_BPD[0, patch]))

  for patch in range(PATCHES):
    grad = jax.grad(hidden_sum)(table_VD, patch).reshape(PATCHES, PATCH, -1)
    size_P = np.abs(grad).sum(axis=(1, 2))
    assert np.all(size_P[: patch + 1] > 0)
    np.testing.assert_array_equal(size_P[patch + 1 :], 0)


@pytest.mark.parametrize("prefill", [1, 3, PATCHES])
def test_patch_by_patch_with_a_cache_equals_all_patches_at_once(model, params, token_BPK, prefill):
  expected_BPD, _ = layers.apply(model, params, token_BPK)
  cache = memory.Cache.empty(PATCHES + 2)
  hidden_BPD, cache = layers.apply(model, params, token_BPK[:, :prefill], None, cache)
  parts = [hidden_BPD]
  for patch in range(prefill, PATCHES):
    hidden_BPD, cache = layers.apply(model, params, token_BPK[:, patch : patch + 1], None, cache)
    parts.append(hidden_BPD)
  np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected_BPD, atol=2e-5)
  assert int(cache.next_position) == PATCHES


@pytest.mark.parametrize("slots", [3, 5])
def test_a_full_window_forgets_the_oldest_patch(slots, model, params, token_BPK):
  """With one layer: a patch outside the window changes nothing, one inside it does."""
  one_layer = backbone.Backbone(
    config.Backbone(layers=1, width=16, ffn=24, heads=4, kv_heads=2, init="fan_in"), VOCAB
  )
  first = jax.tree.map(lambda x: x[:1], params["llama"]["layers"])
  params = {**params, "llama": {**params["llama"], "layers": first}}

  def last(token_BPK):
    cache = memory.Cache.empty(slots, window=3)
    hidden_BPD = None
    for patch in range(PATCHES):
      hidden_BPD, cache = layers.apply(
        one_layer, params, token_BPK[:, patch : patch + 1], None, cache
      )
    return np.asarray(hidden_BPD)

  forgotten = token_BPK.at[:, PATCHES - 4].set(0)
  remembered = token_BPK.at[:, PATCHES - 3].set(0)
  np.testing.assert_array_equal(last(forgotten), last(token_BPK))
  assert np.abs(last(remembered) - last(token_BPK)).max() > 1e-3


def test_an_example_that_starts_later_sees_nothing_before_its_start(model, params, token_BPK):
  """Padding in front, of any tokens, does not change its hidden states."""
  start_B = jnp.array([0, 2, 4])
  cache = memory.Cache.empty(PATCHES + 1, start_B)
  padded_BPD, cache = layers.apply(model, params, token_BPK, None, cache)
  next_B1K = token_BPK[:, :1]
  next_BPD, _ = layers.apply(model, params, next_B1K, None, cache)
  for row, start in enumerate(start_B):
    own_1PK = token_BPK[row : row + 1, start:]
    alone_1PD, after = layers.apply(model, params, own_1PK, None, memory.Cache.empty(PATCHES + 1))
    np.testing.assert_allclose(padded_BPD[row, start:], alone_1PD[0], atol=2e-5)
    next_1PD, _ = layers.apply(model, params, next_B1K[row : row + 1], None, after)
    np.testing.assert_allclose(next_BPD[row], next_1PD[0], atol=2e-5)


def test_rotation_makes_attention_depend_only_on_distance():
  q_C, k_C = jax.random.normal(jax.random.key(0), (2, 8))

  def score(query_at, key_at):
    x_BPHC = jnp.stack([q_C, k_C])[None, :, None]
    q, k = llama.rotate(x_BPHC, jnp.array([query_at, key_at]), 10000.0)[0, :, 0]
    return float(q @ k)

  assert score(5, 3) == pytest.approx(score(105, 103), rel=1e-4)
  assert abs(score(5, 3) - score(5, 4)) > 1e-3


def test_rotation_by_hand():
  """Position 2, two channels of frequency 1: a rotation by 2 radians."""
  x_BPHC = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
  rotated_C = llama.rotate(x_BPHC, jnp.array([2]), 10000.0)[0, 0, 0]
  np.testing.assert_allclose(rotated_C, [np.cos(2.0), np.sin(2.0)], rtol=1e-6)


def test_layers_keep_no_activation_that_is_cheap_to_recompute(model, params, token_BPK):
  """Of the inner width, only the inputs of SwiGLU; in bfloat16, nothing in float32."""
  model = backbone.Backbone(SIZES, VOCAB, jnp.bfloat16)

  def loss(params):
    return jnp.sum(layers.apply(model, params, token_BPK)[0].astype(jnp.float32))

  traced = jax.make_jaxpr(jax.grad(loss))(params)
  forward, _ = (equation for equation in traced.eqns if equation.primitive.name == "scan")
  stacks = [output.aval for output in forward.outvars]  # Stacked over layers, or carried.
  lead = (SIZES.layers, len(token_BPK), PATCHES)
  inner = [stack.dtype for stack in stacks if stack.shape == (*lead, SIZES.ffn)]
  assert inner == [jnp.bfloat16] * 2, stacks
  wide = [stack.dtype for stack in stacks if stack.shape == (*lead, SIZES.width)]
  assert wide and jnp.dtype("float32") not in wide, stacks
