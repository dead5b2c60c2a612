"""Tokens -> hidden -> latents -> tokens: the three modules of CALM as pure functions."""

import dataclasses
from typing import Any

import jax
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import autoencoder as autoencoder_lib
from calm_jax.models import backbone as backbone_lib
from calm_jax.models import energy_head, heads, layers

Params = Any

# Patches whose logits [K, V] are in memory at once while candidates are decoded.
DECODE_CHUNK = 1024


def decode_tokens(model: autoencoder_lib.Autoencoder, params: Params, z_Z: jax.Array) -> jax.Array:
  """Returns the most likely tokens of latents [..., Z]: int32 [..., K].

  Works through the latents in chunks, so that the logits over the vocabulary
  are never all in memory.
  """

  def most_likely(one_Z):
    logits_KV = layers.apply(model, params, one_Z, method="decode")
    return jnp.argmax(logits_KV, axis=-1).astype(jnp.int32)

  flat = z_Z.reshape(-1, z_Z.shape[-1])
  tokens = jax.lax.map(most_likely, flat, batch_size=min(DECODE_CHUNK, len(flat)))
  return tokens.reshape(*z_Z.shape[:-1], tokens.shape[-1])


@dataclasses.dataclass(frozen=True)
class Calm:
  """The language model over latents, with the frozen autoencoder that defines them.

  Trained parameters are {"backbone": ..., "head": ...}; the autoencoder's are
  passed beside them and never trained here.
  """

  autoencoder: autoencoder_lib.Autoencoder
  backbone: backbone_lib.Backbone
  head: energy_head.EnergyHead

  @classmethod
  def build(cls, run: config.CalmRun, codec: autoencoder_lib.Autoencoder) -> "Calm":
    """Returns the model of a run over a given autoencoder."""
    dtype = jnp.dtype(run.training.compute_dtype)
    return cls(
      autoencoder=codec,
      backbone=backbone_lib.Backbone(run.model, codec.vocab_size, dtype),
      head=heads.build(run.head, codec.sizes.latent, run.model.init, dtype),
    )

  def init(self, key: jax.Array) -> Params:
    """Returns initial parameters, float32."""
    backbone_key, head_key = jax.random.split(key)
    token_BPK = jnp.zeros((1, 2, self.autoencoder.sizes.patch_size), jnp.int32)
    hidden_D = jnp.zeros((self.backbone.sizes.width,))
    noise_NR = jnp.zeros((1, self.head.sizes.noise))
    return {
      "backbone": self.backbone.init(backbone_key, token_BPK)["params"],
      "head": self.head.init(head_key, hidden_D, noise_NR)["params"],
    }

  def hidden(
    self, params: Params, token_BPK: jax.Array, cache: backbone_lib.Cache | None = None
  ) -> tuple[jax.Array, backbone_lib.Cache | None]:
    """Returns hidden states [B, P, D], of which the one at i predicts patch i + 1."""
    return layers.apply(self.backbone, params["backbone"], token_BPK, cache)

  def samples(self, params: Params, hidden_D: jax.Array, noise_NR: jax.Array) -> jax.Array:
    """Returns latents [N, ..., Z] for hidden states [..., D] and noise [N, ..., R]."""
    return layers.apply(self.head, params["head"], hidden_D, noise_NR)
