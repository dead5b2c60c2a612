"""Patches -> hidden: the input projection and the Llama Transformer over patches."""

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import layers, llama, memory
from calm_jax.parallel import mesh


class InputProjection(nn.Module):
  """The K token embeddings of a patch -> one input vector: [B, P, K, D] -> [B, P, D]."""

  sizes: config.Backbone
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BPKD):
    sizes = self.sizes
    x_BPD = x_BPKD.reshape(*x_BPKD.shape[:2], -1)
    x_BPD = layers.linear("up", 2 * sizes.width, sizes.init, self.dtype)(x_BPD)
    x_BPD = mesh.constrain(x_BPD, "batch", "position", "width")
    x_BPD = layers.linear("down", sizes.width, sizes.init, self.dtype)(nn.silu(x_BPD))
    return layers.layer_norm("norm", self.dtype)(x_BPD)


class Backbone(nn.Module):
  """Patches -> hidden states; the one at patch i predicts patch i + 1.

  `sizes.input` says what the Transformer reads of a patch: its tokens, embedded and
  projected (discrete), its latent through one Linear (continuous), or the sum of both.

  Source: CALM (arXiv:2510.27688), section 4; the layers are Llama's.
  """

  sizes: config.Backbone
  vocab_size: int
  dtype: jnp.dtype = jnp.float32
  execution: config.Execution = config.Execution()

  @nn.compact
  def __call__(
    self,
    token_BPK: jax.Array,
    latent_BPZ: jax.Array | None = None,
    cache: memory.Memory | None = None,
  ) -> tuple[jax.Array, memory.Memory | None]:
    """Returns hidden states [B, P, D] and the cache with the P patches in it.

    Args:
      token_BPK, latent_BPZ: the patches. Latents may be None if the input is discrete.
      cache: earlier patches; see `llama.Llama`.
    """
    sizes, inputs_BPD = self.sizes, []
    if sizes.reads_tokens:
      embed = nn.Embed(
        self.vocab_size,
        sizes.width,
        dtype=self.dtype,
        embedding_init=layers.embedding_init(sizes.init, sizes.width),
        name="embed",
      )
      x_BPKD = mesh.constrain(embed(token_BPK), "batch", "position", None, None)
      inputs_BPD.append(InputProjection(sizes, self.dtype, name="input")(x_BPKD))
    if sizes.reads_latents:
      assert latent_BPZ is not None
      latent_BPZ = mesh.constrain(latent_BPZ, "batch", "position", None)
      latent_in = layers.linear("latent_in", sizes.width, sizes.init, self.dtype)
      inputs_BPD.append(latent_in(latent_BPZ))
    return llama.Llama(sizes, self.dtype, self.execution, name="llama")(sum(inputs_BPD), cache)
