"""Our settings -> config.json, under the names of the reference and of Hugging Face."""

from typing import Any

from calm_jax import config
from calm_jax.training import trained as trained_lib

_COMMON = {
  "hidden_act": "silu",
  "initializer_range": 0.02,
  "rms_norm_eps": 1e-6,
  "mlp_bias": False,
  "tie_word_embeddings": False,
  "torch_dtype": "float32",
}


def autoencoder(trained: trained_lib.Trained) -> dict[str, Any]:
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
  """Returns the entries of config.json on the Llama layers."""
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


def calm(trained: trained_lib.Trained) -> dict[str, Any]:
  """Returns the reference's config.json of a language model, without the autoencoder's path."""
  run, inner = trained.run, trained.model.sizes
  return {
    "num_samples": run.loss.samples,
    "beta": run.loss.alpha,
    "patch_size": inner.patch_size,
    "latent_size": inner.latent,
    "vocab_size": trained.origin.vocab_size,
    "noise_size": run.head.noise,
    "num_mlp_layers": run.head.blocks,
    "max_position_embeddings": run.data.context // inner.patch_size,
    "eos_token_id": trained.origin.eos_id,
    **transformer(run.model),
  }
