"""Sizes -> floating-point operations: the analytic count of each model.

A multiply-add is two operations. Only matrix products are counted: norms, activations, noise
and the energy loss itself are left out. Causal attention counts the half that is needed.
Training is three times the forward pass; the frozen autoencoder runs forward only.
"""

from calm_jax import config
from calm_jax.kernels import attention
from calm_jax.models.heads import registry


def _swiglu(width: int, ffn: int) -> int:
  return 3 * 2 * width * ffn


def encoder_per_patch(sizes: config.Autoencoder) -> int:
  """Forward FLOPs of encoding one patch."""
  block = _swiglu(sizes.width, sizes.ffn)
  half = sizes.encoder_layers // 2
  linears = 2 * sizes.width * (sizes.patch_size * sizes.width + 2 * sizes.latent)
  return (sizes.patch_size + 1) * half * block + linears


def decoder_per_patch(sizes: config.Autoencoder, vocab_size: int) -> int:
  """Forward FLOPs of decoding one latent to the logits of its K tokens."""
  block = _swiglu(sizes.width, sizes.ffn)
  half = sizes.decoder_layers // 2
  linears = 2 * sizes.width * (sizes.latent + sizes.patch_size * sizes.width)
  vocabulary = vocabulary_per_patch(sizes, vocab_size)
  return (sizes.patch_size + 1) * half * block + linears + vocabulary


def vocabulary_per_patch(sizes: config.Autoencoder, vocab_size: int) -> int:
  """Forward FLOPs of a patch's features times the autoencoder's token table."""
  return 2 * sizes.patch_size * sizes.width * vocab_size


def token_maps_per_patch(sizes: config.Backbone, autoencoder: config.Autoencoder) -> int:
  """Forward FLOPs of the token loss's features of one hidden state."""
  return 2 * sizes.width * autoencoder.patch_size * autoencoder.width


def decoder_weights(sizes: config.Autoencoder) -> int:
  """Number of weights of the decoder, without the token table."""
  blocks = sizes.decoder_layers // 2 * 2 * 3 * sizes.width * sizes.ffn
  return blocks + sizes.width * (sizes.latent + sizes.patch_size * sizes.width)


def transformer_per_position(sizes: config.Transformer, positions: int) -> float:
  """Forward FLOPs of one position through the Llama layers, with `positions` in the context."""
  key_value = 2 * 2 * sizes.width * (sizes.width * sizes.kv_heads // sizes.heads)
  projections = 2 * 2 * sizes.width * sizes.width + key_value
  attention = 2 * 2 * sizes.width * positions / 2
  return sizes.layers * (projections + attention + _swiglu(sizes.width, sizes.ffn))


def input_per_patch(sizes: config.Backbone, autoencoder: config.Autoencoder) -> int:
  """Forward FLOPs of turning one patch into the backbone's input."""
  tokens = 2 * sizes.width * 2 * sizes.width * (autoencoder.patch_size + 1)
  latents = 2 * autoencoder.latent * sizes.width
  return tokens * sizes.reads_tokens + latents * sizes.reads_latents


def computed_transformer(sizes: config.Transformer, positions: int) -> float:
  """Training FLOPs of one position; the backward pass of attention recomputes the scores."""
  forward = transformer_per_position(sizes, positions)
  product = sizes.layers * attention.product_flops(1, positions, sizes.width) / positions
  forward -= attention.FORWARD_PRODUCTS * product
  return 3 * forward + (attention.FORWARD_PRODUCTS + attention.BACKWARD_PRODUCTS) * product


def head_parts(sizes: config.Head, width: int, latent: int) -> tuple[int, int]:
  """Forward FLOPs of sampling from the head: once per hidden state, and per sample."""
  return registry.lookup(sizes).sampling_flops(sizes, width, latent)


def transformer_parts(sizes: config.Transformer, positions: int) -> dict[str, float]:
  """Training FLOPs of one position through the Llama layers, with attention as a separate part."""
  total, without_attention = (transformer_per_position(sizes, n) for n in (positions, 0))
  return {"backbone": 3 * without_attention, "attention": 3 * (total - without_attention)}
