"""Sizes -> floating-point operations: the analytic count of each model.

A multiply-add is two. Only matrix products count: norms, activations, noise and
the energy loss itself are left out. Causal attention counts the half that is
needed. Training is three times the forward pass; the frozen autoencoder runs
forward only.
"""

from calm_jax import config
from calm_jax.models import attention, denoiser, diffusion_head, flow_head


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


def decoder_weights(sizes: config.Autoencoder) -> int:
  """Weights of the decoder but its token table."""
  blocks = sizes.decoder_layers // 2 * 2 * 3 * sizes.width * sizes.ffn
  return blocks + sizes.width * (sizes.latent + sizes.patch_size * sizes.width)


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


def _computed_transformer(sizes: config.Transformer, positions: int) -> float:
  """Training FLOPs of one position: attention's backward pass computes the scores again."""
  forward = transformer_per_position(sizes, positions)
  product = sizes.layers * attention.product_flops(1, positions, sizes.width) / positions
  forward -= attention.FORWARD_PRODUCTS * product
  return 3 * forward + (attention.FORWARD_PRODUCTS + attention.BACKWARD_PRODUCTS) * product


def _energy_parts(sizes: config.Head, width: int, latent: int) -> tuple[int, int]:
  shared = 2 * width * width * (sizes.blocks + 1)
  block = 2 * width * (width + width + 2 * width + width)
  return shared, sizes.blocks * block + 2 * width * (sizes.noise + width + latent)


def _denoiser_parts(sizes: config.Head, width: int, latent: int) -> tuple[int, int]:
  outputs, steps = {
    "flow": (latent, 2 * (sizes.steps or flow_head.STEPS)),
    "diffusion": (2 * latent, sizes.steps or diffusion_head.STEPS),
  }[sizes.kind]
  shared = 2 * width * width
  return shared, steps * (_denoiser_call(sizes, width, latent, outputs) - shared)


_HEAD_PARTS = {"energy": _energy_parts, "flow": _denoiser_parts, "diffusion": _denoiser_parts}


def head_parts(sizes: config.Head, width: int, latent: int) -> tuple[int, int]:
  """Forward FLOPs of the head while writing: once a hidden state, and of each draw."""
  return _HEAD_PARTS[sizes.kind](sizes, width, latent)


def _computed_energy(run: config.CalmRun, codec: config.Autoencoder) -> float:
  """Training FLOPs of the head for one patch: what reads the hidden state alone is computed
  once, and noise needs no gradient.
  """
  once, sample = head_parts(run.head, run.model.width, codec.latent)
  noise = 2 * run.head.noise * run.model.width
  return 3 * (once + run.loss.samples * sample) - run.loss.samples * noise


def _computed_calm(run: config.CalmRun, codec: config.Autoencoder, vocab_size: int) -> float:
  config.require(
    run.head.kind == "energy",
    f"what is computed is counted for the energy head only, not for {run.head.kind!r}",
  )
  patches = run.data.context // codec.patch_size
  backbone = _computed_transformer(run.model, patches) + 3 * input_per_patch(run.model, codec)
  return backbone + _computed_energy(run, codec) + encoder_per_patch(codec)


def _computed_baseline(run: config.TransformerRun, codec, vocab_size: int) -> float:
  backbone = _computed_transformer(run.model, run.data.context)
  return backbone + 3 * 2 * run.model.width * vocab_size


Parts = dict[str, float]


def _layers(sizes: config.Transformer, positions: int) -> Parts:
  whole, alone = (transformer_per_position(sizes, n) for n in (positions, 0))
  return {"backbone": 3 * alone, "attention": 3 * (whole - alone)}


def _autoencoder_parts(run: config.AutoencoderRun, codec, vocab_size: int) -> Parts:
  trunk = decoder_per_patch(run.model, 0)
  return {
    "encoder": 3 * encoder_per_patch(run.model),
    "decoder": 3 * trunk,
    "vocabulary": 3 * (decoder_per_patch(run.model, vocab_size) - trunk),
  }


def _calm_parts(run: config.CalmRun, codec: config.Autoencoder, vocab_size: int) -> Parts:
  patches = run.data.context // codec.patch_size
  sample = HEAD_SAMPLES[run.head.kind](run.head, run.model.width, codec.latent)
  return {
    **_layers(run.model, patches),
    "input": 3 * input_per_patch(run.model, codec),
    "head": 3 * run.loss.samples * sample,
    "frozen encoder": encoder_per_patch(codec),
  }


def _transformer_parts(run: config.TransformerRun, codec, vocab_size: int) -> Parts:
  return {
    **_layers(run.model, run.data.context),
    "vocabulary": 3 * 2 * run.model.width * vocab_size,
  }


_STAGES = {
  "autoencoder": _autoencoder_parts,
  "calm": _calm_parts,
  "transformer": _transformer_parts,
}


_COMPUTED = {
  "autoencoder": lambda *given: sum(_autoencoder_parts(*given).values()),
  "calm": _computed_calm,
  "transformer": _computed_baseline,
}


def computed_per_token(run: config.Run, codec: config.Autoencoder | None, vocab_size: int) -> float:
  """FLOPs a token that our program computes where nothing is recomputed but by the kernel.

  It differs from `train_per_token`, the published count, where the reference computes
  more (the hidden state's part of the head, once a sample) and where the kernel of
  attention does (its backward pass has five products and not four).
  """
  return _COMPUTED[run.stage](run, codec, vocab_size) / (codec.patch_size if codec else 1)


def train_parts(run: config.Run, codec: config.Autoencoder | None, vocab_size: int) -> Parts:
  """Training FLOPs a token of any stage by part; `codec` holds the sizes of stage two's."""
  parts = _STAGES[run.stage](run, codec, vocab_size)
  return {name: value / (codec.patch_size if codec else 1) for name, value in parts.items()}


def train_per_token(run: config.Run, codec: config.Autoencoder | None, vocab_size: int) -> float:
  """Training FLOPs a token of any stage; see `train_parts`."""
  return sum(train_parts(run, codec, vocab_size).values())
