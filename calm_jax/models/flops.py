"""Sizes -> floating-point operations: the analytic count of each model.

A multiply-add is two. Only matrix products count: norms, activations, noise and
the energy loss itself are left out. Causal attention counts the half that is
needed. Training is three times the forward pass; the frozen autoencoder runs
forward only.
"""

from calm_jax import config
from calm_jax.models import denoiser


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


def transformer_per_position(sizes: config.Transformer, positions: int) -> float:
  """Forward FLOPs of one position through the Llama layers, `positions` in context."""
  key_value = 2 * 2 * sizes.width * (sizes.width * sizes.kv_heads // sizes.heads)
  projections = 2 * 2 * sizes.width * sizes.width + key_value
  attention = 2 * 2 * sizes.width * positions / 2
  return sizes.layers * (projections + attention + _swiglu(sizes.width, sizes.ffn))


def input_per_patch(sizes: config.Backbone, codec: config.Autoencoder) -> int:
  """Forward FLOPs of making one patch the backbone's input."""
  tokens = 2 * sizes.width * 2 * sizes.width * (codec.patch_size + 1)
  latents = 2 * codec.latent * sizes.width
  return tokens * sizes.reads_tokens + latents * sizes.reads_latents


def _energy_sample(sizes: config.Head, width: int, latent: int) -> int:
  """Each first Linear of a block is counted with both its halves for every sample,
  as the reference computes it; we compute the hidden state's half once.
  """
  block = 2 * width * (2 * width + width + 2 * width + width)
  return sizes.blocks * block + 2 * width * (sizes.noise + width + width + latent)


def _denoiser_call(sizes: config.Head, width: int, latent: int, outputs: int) -> int:
  block = 2 * width * (3 * width + width + width)
  condition = 2 * width * (width + 2 * denoiser.FREQUENCIES + width)
  return sizes.blocks * block + condition + 2 * width * (latent + 2 * width + outputs)


# Forward FLOPs of what training does with the head once a sample.
HEAD_SAMPLES = {
  "energy": _energy_sample,
  "flow": lambda sizes, width, latent: _denoiser_call(sizes, width, latent, latent),
  "diffusion": lambda sizes, width, latent: _denoiser_call(sizes, width, latent, 2 * latent),
}


def _autoencoder_patch(run: config.AutoencoderRun, codec, vocab_size: int) -> float:
  return 3 * (encoder_per_patch(run.model) + decoder_per_patch(run.model, vocab_size))


def _calm_patch(run: config.CalmRun, codec: config.Autoencoder, vocab_size: int) -> float:
  patches = run.data.context // codec.patch_size
  forward = transformer_per_position(run.model, patches) + input_per_patch(run.model, codec)
  sample = HEAD_SAMPLES[run.head.kind](run.head, run.model.width, codec.latent)
  return 3 * (forward + run.loss.samples * sample) + encoder_per_patch(codec)


def _transformer_patch(run: config.TransformerRun, codec, vocab_size: int) -> float:
  forward = transformer_per_position(run.model, run.data.context)
  return 3 * (forward + 2 * run.model.width * vocab_size)


_STAGES = {
  "autoencoder": _autoencoder_patch,
  "calm": _calm_patch,
  "transformer": _transformer_patch,
}


def train_per_token(run: config.Run, codec: config.Autoencoder | None, vocab_size: int) -> float:
  """Training FLOPs a token of any stage; `codec` holds the sizes of stage two's autoencoder."""
  return _STAGES[run.stage](run, codec, vocab_size) / (codec.patch_size if codec else 1)
