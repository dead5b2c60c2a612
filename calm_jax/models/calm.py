"""Tokens -> hidden -> latents -> tokens: the three modules of CALM as pure functions."""

import dataclasses
from typing import Any

import jax
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import autoencoder as autoencoder_lib
from calm_jax.models import backbone as backbone_lib
from calm_jax.models import heads, layers, memory

Params = Any

# Patches whose logits [K, V] are in memory at once while candidates are decoded.
DECODE_CHUNK = 1024


def decode_tokens(
  model: autoencoder_lib.Autoencoder, params: Params, z_Z: jax.Array, chunk: int = 0
) -> jax.Array:
  """Returns the most likely tokens of latents [..., Z]: int32 [..., K].

  Works through the latents in chunks, so that the logits over the vocabulary
  are never all in memory.
  """

  def read(some_Z):
    logits_KV = layers.apply(model, params, some_Z, method="decode")
    return layers.most_likely(logits_KV)

  tokens = layers.in_chunks(read, z_Z.reshape(-1, z_Z.shape[-1]), chunk or DECODE_CHUNK)
  return tokens.reshape(*z_Z.shape[:-1], tokens.shape[-1])


def posterior_draws(
  key: jax.Array, mean_Z: jax.Array, log_std_Z: jax.Array, count: int
) -> jax.Array:
  """Returns `count` draws z = mean + std · eps of posteriors [..., Z]: [M, ..., Z]."""
  eps_MZ = jax.random.normal(key, (count, *mean_Z.shape))
  return mean_Z[None] + jnp.exp(log_std_Z)[None] * eps_MZ


@dataclasses.dataclass(frozen=True)
class Calm:
  """The language model over latents, with the frozen autoencoder that defines them.

  Trained parameters are {"backbone": ..., "head": ...}; the autoencoder's are
  passed beside them and never trained here.
  """

  autoencoder: autoencoder_lib.Autoencoder
  backbone: backbone_lib.Backbone
  head: heads.Head

  @classmethod
  def build(
    cls, run: config.CalmRun, codec: autoencoder_lib.Autoencoder, vocab_size: int
  ) -> "Calm":
    """Returns the model of a run over a given autoencoder.

    `vocab_size` is that of the backbone's token table. It may be above the
    autoencoder's, where an imported model has a padded one.
    """
    dtype = jnp.dtype(run.training.compute_dtype)
    sizes = run.model
    return cls(
      autoencoder=codec,
      backbone=backbone_lib.Backbone(sizes, vocab_size, dtype, run.execution),
      head=heads.build(
        run.head, sizes.width, codec.sizes.latent, sizes.init, dtype, run.execution.remat
      ),
    )

  def init(self, key: jax.Array) -> Params:
    """Returns initial parameters, float32."""
    backbone_key, head_key = jax.random.split(key)
    sizes = self.autoencoder.sizes
    token_BPK = jnp.zeros((1, 2, sizes.patch_size), jnp.int32)
    latent_BPZ = jnp.zeros((1, 2, sizes.latent))
    return {
      "backbone": self.backbone.init(backbone_key, token_BPK, latent_BPZ)["params"],
      "head": self.head.init(head_key),
    }

  def hidden(
    self,
    params: Params,
    token_BPK: jax.Array,
    latent_BPZ: jax.Array | None = None,
    known: memory.Memory | None = None,
  ) -> tuple[jax.Array, memory.Memory | None]:
    """Returns hidden states [B, P, D], of which the one at i predicts patch i + 1.

    Args:
      latent_BPZ: needed where `backbone.sizes.reads_latents`; see `posterior_draws`.
    """
    return layers.apply(self.backbone, params["backbone"], token_BPK, latent_BPZ, known)

  def samples(self, params: Params, hidden_D: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns latents [N, ..., Z] for hidden states [..., D] and the head's noise [N, ..., *]."""
    condition = self.head.condition(params["head"], hidden_D)
    return self.head.samples(params["head"], condition, noise)

  def sample(self, params: Params, hidden_D: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """Returns `count` latents [N, ..., Z] for hidden states [..., D]."""
    return self.head.sample(params["head"], hidden_D, key, count)
