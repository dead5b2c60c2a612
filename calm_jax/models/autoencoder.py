"""Patches <-> latents: the near-lossless autoencoder of stage one."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import layers
from calm_jax.parallel import mesh


class Block(nn.Module):
  """x + SwiGLU(RMSNorm(x)): [..., E] -> [..., E]."""

  sizes: config.Autoencoder
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_E):
    y_E = layers.rms_norm("norm", self.dtype)(x_E)
    y_E = layers.SwiGLU(self.sizes.ffn, self.sizes.init, self.dtype, name="mlp")(y_E)
    # Before the sum: without this, XLA miscomputes data x fsdp x tensor meshes inside a scan.
    return x_E + mesh.constrain(y_E, "position", *[None] * (y_E.ndim - 1))


class Encoder(nn.Module):
  """Embedded tokens [..., K, E] -> (mean, log_std), each [..., Z] float32."""

  sizes: config.Autoencoder
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_KE):
    sizes = self.sizes
    for i in range(sizes.encoder_layers // 2):
      x_KE = Block(sizes, self.dtype, name=f"token_block_{i}")(x_KE)
      x_KE = mesh.constrain(x_KE, "position", None, None)
    x_E = x_KE.reshape(*x_KE.shape[:-2], sizes.patch_size * sizes.width)
    x_E = layers.linear("squeeze", sizes.width, sizes.init, self.dtype)(x_E)
    for i in range(sizes.encoder_layers // 2):
      x_E = mesh.constrain(x_E, "position", None)
      x_E = Block(sizes, self.dtype, name=f"patch_block_{i}")(x_E)
    x_E = mesh.constrain(x_E, "position", None)
    x_E = layers.rms_norm("norm", self.dtype)(x_E)
    posterior_2Z = layers.linear("posterior", 2 * sizes.latent, sizes.init, self.dtype)(x_E)
    posterior_2Z = mesh.constrain(posterior_2Z, "position", None)
    mean_Z, log_std_Z = jnp.split(posterior_2Z.astype(jnp.float32), 2, axis=-1)
    return mean_Z, log_std_Z


class Decoder(nn.Module):
  """Latent [..., Z] -> normed features [..., K, E], to be multiplied by the token table."""

  sizes: config.Autoencoder
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, z_Z):
    sizes = self.sizes
    x_E = layers.linear("from_latent", sizes.width, sizes.init, self.dtype)(z_Z)
    for i in range(sizes.decoder_layers // 2):
      x_E = mesh.constrain(x_E, "position", None)
      x_E = Block(sizes, self.dtype, name=f"patch_block_{i}")(x_E)
    x_KE = layers.linear("expand", sizes.patch_size * sizes.width, sizes.init, self.dtype)(x_E)
    x_KE = x_KE.reshape(*x_E.shape[:-1], sizes.patch_size, sizes.width)
    for i in range(sizes.decoder_layers // 2):
      x_KE = mesh.constrain(x_KE, "position", None, None)
      x_KE = Block(sizes, self.dtype, name=f"token_block_{i}")(x_KE)
    x_KE = mesh.constrain(x_KE, "position", None, None)
    return layers.rms_norm("norm", self.dtype)(x_KE)


class Autoencoder(nn.Module):
  """Encodes each patch of K tokens, independently of others, into Z numbers, and decodes them.

  One token table [V, E] is both the input embedding and the output layer.

  Source: CALM (arXiv:2510.27688), section 3.
  """

  sizes: config.Autoencoder
  vocab_size: int
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.embed = nn.Embed(
      self.vocab_size,
      self.sizes.width,
      dtype=self.dtype,
      embedding_init=layers.embedding_init(self.sizes.init, self.sizes.width),
    )
    self.encoder = Encoder(self.sizes, self.dtype)
    self.decoder = Decoder(self.sizes, self.dtype)

  def encode(self, token_K: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the posterior of patches [..., K]: mean and log std, [..., Z] float32 each."""
    x_KE = mesh.constrain(self.embed(token_K), "position", None, None)
    return self.encoder(x_KE)

  def features(self, z_Z: jax.Array) -> jax.Array:
    """Returns features of latents [..., Z], to be multiplied by the token table: [..., K, E]."""
    return self.decoder(z_Z)

  def decode(self, z_Z: jax.Array) -> jax.Array:
    """Returns the logits of the K tokens of latents [..., Z]: [..., K, V] float32."""
    return self.embed.attend(self.decoder(z_Z)).astype(jnp.float32)

  def decode_among(self, z_Z: jax.Array, token_KU: jax.Array) -> jax.Array:
    """Returns the logits of U tokens for each place of latents [..., Z]: [..., K, U] float32."""
    feature_KE = self.decoder(z_Z)
    return jnp.einsum("...KE,KUE->...KU", feature_KE, self.embed(token_KU)).astype(jnp.float32)

  def __call__(self, token_K: jax.Array) -> jax.Array:
    """Returns the logits at the posterior mean; creates every parameter."""
    return self.decode(self.encode(token_K)[0])

  @nn.nowrap  # `function` may copy the module, which a method may not.
  def mapped(self, function: Callable[[Any], Any]) -> Any:
    """Returns the model with `function` applied to each of its linen modules, itself."""
    return function(self)

  def initial(self, key: jax.Array) -> Any:
    """Returns initial parameters, float32."""
    return self.init(key, jnp.zeros((self.sizes.patch_size,), jnp.int32))["params"]
