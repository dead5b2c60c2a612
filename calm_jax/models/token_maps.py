"""Hidden -> features of the next patch's tokens, by which training teaches the trunk."""

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax.models import layers
from calm_jax.parallel import mesh


class TokenMaps(nn.Module):
  """One Linear of the hidden state per place of the next patch: [..., D] -> [..., K, E].

  Each place's features are multiplied by the autoencoder's token table, of width E. Only training
  and evaluation use them: no draw reads them.
  """

  patch_size: int
  width: int
  scheme: str
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, hidden_D: jax.Array) -> jax.Array:
    features = self.patch_size * self.width
    up = layers.linear("up", features, self.scheme, self.dtype, bias=False)
    feature_F = mesh.constrain(up(hidden_D), "position", "width")
    return feature_F.reshape(*hidden_D.shape[:-1], self.patch_size, self.width)
