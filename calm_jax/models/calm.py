"""Tokens -> hidden -> latents -> tokens: the three modules of CALM as pure functions."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp

from calm_jax import config
from calm_jax.kernels import argmax
from calm_jax.models import autoencoder as autoencoder_lib
from calm_jax.models import backbone as backbone_lib
from calm_jax.models import layers, memory
from calm_jax.models import token_maps as token_maps_lib
from calm_jax.models.heads import head as head_lib
from calm_jax.models.heads import registry

Params = Any

EXECUTION = config.Execution()
# Patches whose logits [K, V] are in memory at once while candidates are decoded.
DECODE_CHUNK = 1024


def decode_tokens(
  model: autoencoder_lib.Autoencoder, params: Params, z_Z: jax.Array, chunk: int = 0
) -> jax.Array:
  """Returns the most likely tokens of latents [..., Z]: int32 [..., K].

  Decodes in chunks of latents, by default DECODE_CHUNK, so that only the logits of one chunk
  are in memory.
  """

  def decode(chunk_Z):
    logits_KV = layers.apply(model, params, chunk_Z, method="decode")
    return argmax.most_likely(logits_KV)

  tokens = layers.in_chunks(decode, z_Z.reshape(-1, z_Z.shape[-1]), chunk or DECODE_CHUNK)
  return tokens.reshape(*z_Z.shape[:-1], tokens.shape[-1])


@dataclasses.dataclass(frozen=True)
class Calm:
  """The language model over latents.

  The trained parameters are {"backbone": ..., "head": ...}, and "token_maps" with a token loss. The
  autoencoder is a parent of the stage: its module and its parameters are passed separately and
  never trained here.

  Attributes:
    sizes: sizes of the autoencoder.
    token_maps: how the token loss reads hidden states; None without one.
  """

  backbone: backbone_lib.Backbone
  head: head_lib.Head
  sizes: config.Autoencoder
  token_maps: token_maps_lib.TokenMaps | None = None

  @classmethod
  def build(
    cls,
    sizes: config.Backbone,
    head: config.Head,
    autoencoder: config.Autoencoder,
    vocab_size: int,
    dtype: Any = jnp.float32,
    execution: config.Execution = EXECUTION,
    token_loss: bool = False,
  ) -> "Calm":
    """Returns the model over an autoencoder of given sizes.

    Args:
      vocab_size: V of the backbone's token table, which may exceed the autoencoder's where
        an imported table is padded.
      token_loss: whether it is trained with a token loss too.
    """
    dtype = jnp.dtype(dtype)
    trunk = head_lib.Trunk(sizes.width, autoencoder.latent, sizes.init, dtype, execution.remat)
    maps = token_maps_lib.TokenMaps(autoencoder.patch_size, autoencoder.width, sizes.init, dtype)
    return cls(
      backbone=backbone_lib.Backbone(sizes, vocab_size, dtype, execution),
      head=registry.build(head, trunk),
      sizes=autoencoder,
      token_maps=maps if token_loss else None,
    )

  def mapped(self, function: Callable[[Any], Any]) -> "Calm":
    """Returns the model with `function` applied to each of its linen modules."""
    head: Any = copy.copy(self.head)
    head.network = function(head.network)
    return dataclasses.replace(self, backbone=function(self.backbone), head=head)

  def initial(self, key: jax.Array) -> Params:
    """Returns initial parameters, float32."""
    backbone_key, head_key = jax.random.split(key)
    token_BPK = jnp.zeros((1, 2, self.sizes.patch_size), jnp.int32)
    latent_BPZ = jnp.zeros((1, 2, self.sizes.latent))
    params = {
      "backbone": self.backbone.init(backbone_key, token_BPK, latent_BPZ)["params"],
      "head": self.head.init(head_key),
    }
    return params | self._initial_token_maps(key)

  def _initial_token_maps(self, key: jax.Array) -> Params:
    """Returns {"token_maps": initial parameters}, or {} without a token loss."""
    if self.token_maps is None:
      return {}
    hidden_D = jnp.zeros(self.backbone.sizes.width)
    maps_key = jax.random.fold_in(key, 2)  # The others start as without a token loss.
    return {"token_maps": self.token_maps.init(maps_key, hidden_D)["params"]}

  def drawing(self, params: Params) -> Params:
    """Returns the parameters that draws read, which are those of the published model."""
    return {name: params[name] for name in ("backbone", "head")}

  def fitted(self, params: Params) -> Params:
    """Returns a language model's parameters with initial token maps, or without, as this needs."""
    maps = self._initial_token_maps(jax.random.key(0))
    return self.drawing(params) | {name: params.get(name, own) for name, own in maps.items()}

  def hidden(
    self,
    params: Params,
    token_BPK: jax.Array,
    latent_BPZ: jax.Array | None = None,
    cache: memory.Memory | None = None,
  ) -> tuple[jax.Array, memory.Memory | None]:
    """Returns hidden states [B, P, D] and the cache with the P patches in it.

    The hidden state of patch i predicts patch i + 1.

    Args:
      latent_BPZ: draws of the posteriors, needed if `backbone.sizes.reads_latents`.
      cache: earlier patches; see `llama.Llama`.
    """
    return layers.apply(self.backbone, params["backbone"], token_BPK, latent_BPZ, cache)

  def samples(self, params: Params, hidden_D: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns N latents [N, ..., Z] of hidden states [..., D] and the head's noise [N, ..., *]."""
    condition = self.head.condition(params["head"], hidden_D)
    return self.head.samples(params["head"], condition, noise)

  def sample(self, params: Params, hidden_D: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """Returns `count` (N) latents [N, ..., Z] of hidden states [..., D]."""
    return self.head.sample(params["head"], hidden_D, key, count)
