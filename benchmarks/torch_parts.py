"""PyTorch modules that several peers share.

They compute what the published code computes, in the same way: the hidden state goes through
the head once per sample, distances are those of a materialised (N, M, P, Z) tensor, and logits
are materialised too. Weights have the published names, so that ours can be loaded.
"""

from typing import Any

import torch
import transformers

from calm_jax.interchange.torch_module import modeling_calm as modeling


def autoencoder(sizes: Any, vocab_size: int) -> modeling.CalmAutoencoder:
  """Returns an autoencoder of initial values."""
  return modeling.CalmAutoencoder(
    modeling.CalmAutoencoderConfig(
      patch_size=sizes.patch_size,
      vocab_size=vocab_size,
      hidden_size=sizes.width,
      intermediate_size=sizes.ffn,
      latent_size=sizes.latent,
      num_encoder_layers=sizes.encoder_layers,
      num_decoder_layers=sizes.decoder_layers,
    )
  )


def llama(sizes: Any, vocab_size: int, positions: int) -> transformers.LlamaConfig:
  """Returns the settings of a Llama of transformers."""
  undeclared: dict[str, Any] = {"attn_implementation": "sdpa"}
  return transformers.LlamaConfig(
    vocab_size=vocab_size,
    hidden_size=sizes.width,
    intermediate_size=sizes.ffn,
    num_hidden_layers=sizes.layers,
    num_attention_heads=sizes.heads,
    num_key_value_heads=sizes.kv_heads,
    max_position_embeddings=positions,
    rms_norm_eps=1e-6,
    use_cache=False,
    tie_word_embeddings=False,
    **undeclared,
  )


def draw(mean, log_std, shape=()):
  """Returns draws of shape [*shape, *mean.shape] from a normal distribution."""
  return mean + log_std.exp() * torch.randn(*shape, *mean.shape, device=mean.device)
