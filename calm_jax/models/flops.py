"""Sizes -> floating-point operations: the analytic count of each model.

A multiply-add is two. Only matrix products count: norms, activations, noise and
the energy loss itself are left out. Causal attention counts the half that is
needed. Training is three times the forward pass; the frozen autoencoder runs
forward only.
"""

from calm_jax import config


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
  vocabulary = 2 * sizes.patch_size * sizes.width * vocab_size
  return (sizes.patch_size + 1) * half * block + linears + vocabulary


def backbone_per_patch(sizes: config.Backbone, patch_size: int, patches: int) -> float:
  """Forward FLOPs of one patch through input projection and Transformer, `patches` in context."""
  key_value = 2 * 2 * sizes.width * (sizes.width * sizes.kv_heads // sizes.heads)
  projections = 2 * 2 * sizes.width * sizes.width + key_value
  attention = 2 * 2 * sizes.width * patches / 2
  layer = projections + attention + _swiglu(sizes.width, sizes.ffn)
  entry = 2 * sizes.width * 2 * sizes.width * (patch_size + 1)
  return entry + sizes.layers * layer


def head_per_patch(sizes: config.Head, width: int, latent: int, samples: int) -> int:
  """Forward FLOPs of `samples` energy-head samples of one patch.

  Each first Linear of a block is counted with both its halves for every sample,
  as the reference computes it; we compute the hidden state's half once.
  """
  block = 2 * width * (2 * width + width + 2 * width + width)
  ends = 2 * width * (sizes.noise + width + width + latent)
  return samples * (sizes.blocks * block + ends)


def train_per_token(run: config.Run, codec: config.Autoencoder, vocab_size: int) -> float:
  """Training FLOPs a token of either stage; `codec` holds the autoencoder's sizes."""
  if isinstance(run, config.AutoencoderRun):
    patch = 3 * (encoder_per_patch(codec) + decoder_per_patch(codec, vocab_size))
  else:
    patches = run.data.context // codec.patch_size
    forward = backbone_per_patch(run.model, codec.patch_size, patches)
    forward += head_per_patch(run.head, run.model.width, codec.latent, run.loss.samples)
    patch = 3 * forward + encoder_per_patch(codec)
  return patch / codec.patch_size
