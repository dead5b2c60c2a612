"""Claims about the autoencoder: patches are independent, the table is tied, the size published."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import autoencoder, calm, layers

SIZES = config.Autoencoder(patch_size=3, width=8, ffn=16, latent=5, init="fan_in")
VOCAB = 11


@pytest.fixture(scope="module")
def model():
  return autoencoder.Autoencoder(SIZES, VOCAB)


@pytest.fixture(scope="module")
def params(model):
  return model.init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))["params"]


def test_shapes(model, params):
  token_BPK = jnp.zeros((2, 4, 3), jnp.int32)
  mean_BPZ, log_std_BPZ = layers.apply(model, params, token_BPK, method="encode")
  assert mean_BPZ.shape == log_std_BPZ.shape == (2, 4, 5)
  logits_BPKV = layers.apply(model, params, mean_BPZ, method="decode")
  assert logits_BPKV.shape == (2, 4, 3, VOCAB) and logits_BPKV.dtype == jnp.float32


def test_a_patch_is_encoded_independently_of_others(model, params):
  token_PK = jax.random.randint(jax.random.key(1), (6, 3), 0, VOCAB)
  mean_PZ, _ = layers.apply(model, params, token_PK, method="encode")
  changed_PZ, _ = layers.apply(
    model, params, token_PK.at[2, 1].set((token_PK[2, 1] + 1) % VOCAB), method="encode"
  )
  same_P = np.all(np.asarray(mean_PZ == changed_PZ), axis=1)
  np.testing.assert_array_equal(same_P, [True, True, False, True, True, True])


def test_one_table_is_embedding_and_output_layer(model, params):
  tables = [x for x in jax.tree.leaves(params) if VOCAB in x.shape]
  assert len(tables) == 1
  z_Z = jax.random.normal(jax.random.key(2), (5,))
  doubled = {**params, "embed": {"embedding": 2 * params["embed"]["embedding"]}}
  logits_KV = layers.apply(model, params, z_Z, method="decode")
  np.testing.assert_allclose(
    layers.apply(model, doubled, z_Z, method="decode"), 2 * logits_KV, rtol=1e-5
  )


def test_tokens_decoded_in_chunks_are_those_of_the_logits(model, params, monkeypatch):
  z_NPZ = jax.random.normal(jax.random.key(3), (4, 6, 5))
  expected = jnp.argmax(layers.apply(model, params, z_NPZ, method="decode"), axis=-1)
  for chunk in (5, 8, 1024):
    monkeypatch.setattr(calm, "DECODE_CHUNK", chunk)
    np.testing.assert_array_equal(calm.decode_tokens(model, params, z_NPZ), expected)


def test_published_size_in_parameters():
  """75.8 M, of which 65.7 M are the token table (Llama 3's vocabulary)."""
  model = autoencoder.Autoencoder(config.Autoencoder(), 128_256)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert round(count / 1e6, 1) == 75.8
  assert round(shapes["embed"]["embedding"].size / 1e6, 1) == 65.7
