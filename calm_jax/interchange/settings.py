"""Our settings -> config.json, with the names that the reference and Hugging Face use."""

from typing import Any

from calm_jax import config, workdir

_COMMON = {
  "hidden_act": "silu",
  "initializer_range": 0.02,
  "rms_norm_eps": 1e-6,
  "mlp_bias": False,
  "tie_word_embeddings": False,
  "torch_dtype": "float32",
}


def autoencoder(trained: workdir.TrainedAutoencoder) -> dict[str, Any]:
  """Returns the reference's config.json of an autoencoder."""
  sizes, loss = trained.run.model, trained.run.loss
  return {
    "architectures": ["Autoencoder"],
    "patch_size": sizes.patch_size,
    "vocab_size": trained.origin.vocab_size,
    "latent_size": sizes.latent,
    "hidden_size": sizes.width,
    "intermediate_size": sizes.ffn,
    "num_encoder_layers": sizes.encoder_layers,
    "num_decoder_layers": sizes.decoder_layers,
    "ae_dropout": loss.drop_token,
    "kl_clamp": loss.kl_floor,
    "kl_weight": loss.kl_weight,
    "eos_token_id": trained.origin.eos_id,
    **_COMMON,
  }


def transformer(sizes: config.Transformer) -> dict[str, Any]:
  """Returns the part of config.json on the Llama layers."""
  return {
    "hidden_size": sizes.width,
    "intermediate_size": sizes.ffn,
    "num_hidden_layers": sizes.layers,
    "num_attention_heads": sizes.heads,
    "num_key_value_heads": sizes.kv_heads,
    "rope_theta": sizes.rope_theta,
    "attention_bias": False,
    **_COMMON,
  }


def calm(trained: workdir.TrainedCalm) -> dict[str, Any]:
  """Returns the reference's config.json of a language model, without the autoencoder's path."""
  run, codec = trained.run, trained.autoencoder.run.model
  return {
    "num_samples": run.loss.samples,
    "beta": run.loss.alpha,
    "patch_size": codec.patch_size,
    "latent_size": codec.latent,
    "vocab_size": trained.origin.vocab_size,
    "noise_size": run.head.noise,
    "num_mlp_layers": run.head.blocks,
    "max_position_embeddings": run.data.context // codec.patch_size,
    "eos_token_id": trained.origin.eos_id,
    **transformer(run.model),
  }
