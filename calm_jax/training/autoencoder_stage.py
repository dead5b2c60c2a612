"""Stage one for the loop: patches -> latents -> patches."""

import jax
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import autoencoder, calm, layers
from calm_jax.objectives import autoencoding, vocabulary
from calm_jax.parallel import mesh
from calm_jax.training import stages


def build(run: config.AutoencoderRun, vocab_size: int) -> stages.Stage:
  """Returns stage one."""
  dtype = jnp.dtype(run.training.compute_dtype)
  model = autoencoder.Autoencoder(run.model, vocab_size, dtype)
  size, settings = run.model.patch_size, run.loss

  def encode(params, token_BPK):
    def one(token_PK):
      return layers.apply(model, params, token_PK, method="encode")

    return mesh.examples(one, broadcasts=True)(token_BPK)

  def scores(params, z_BPZ, target_BPK):
    """What the decoder makes of latents, [B, P, K] each; the loss is the mean."""

    def one(z_PZ):
      return layers.apply(model, params, z_PZ, method="features")

    feature_BPKE = mesh.examples(one, broadcasts=True)(z_BPZ)
    feature_BSE = feature_BPKE.reshape(len(feature_BPKE), -1, run.model.width)
    target_BS = target_BPK.reshape(len(target_BPK), -1)
    share_BS = jnp.full(target_BS.shape, 1 / target_BS.size)
    table_VE = params["embed"]["embedding"]
    found = vocabulary.cross_entropy(table_VE, feature_BSE, target_BS, share_BS)
    return found._replace(
      cross_entropy=found.cross_entropy.reshape(target_BPK.shape),
      right=found.right.reshape(target_BPK.shape),
    )

  def posterior_draw(mean_BPZ, log_std_BPZ, key_B):
    draw = jax.vmap(calm.posterior_draws, in_axes=(0, 0, 0, None))
    return draw(key_B, mean_BPZ, log_std_BPZ, 1)[:, 0]

  def loss(params, frozen, batch, key):
    target_BPK = stages.patches(batch["tokens"], size)
    token_key_B, noise_key_B, latent_key_B = jax.vmap(
      lambda key: jax.random.split(key, 3), out_axes=1
    )(stages.example_keys(key, batch["index"]))
    drop = jax.vmap(autoencoding.drop_tokens, in_axes=(0, 0, None, None))
    input_BPK = drop(token_key_B, target_BPK, settings.drop_token, settings.drop_token_id)
    mean_BPZ, log_std_BPZ = encode(params, input_BPK)
    z_BPZ = posterior_draw(mean_BPZ, log_std_BPZ, noise_key_B)
    drop = jax.vmap(autoencoding.drop_latents, in_axes=(0, 0, None))
    found = scores(params, drop(latent_key_B, z_BPZ, settings.drop_latent), target_BPK)
    kl = jnp.mean(autoencoding.floored_kl(mean_BPZ, log_std_BPZ, settings.kl_floor))
    metrics = {
      "tokens": jnp.float32(target_BPK.size),
      "patches_per_token": jnp.float32(1 / size),
      "cross_entropy": found.loss,
      "kl": kl,
      "token_accuracy": jnp.mean(found.right),
      "posterior_std": jnp.mean(jnp.exp(log_std_BPZ)),
    }
    return size * found.loss + settings.kl_weight * kl, metrics

  def evaluate(params, frozen, batch, key):
    target_BPK = stages.patches(batch["tokens"], size)
    mean_BPZ, log_std_BPZ = encode(params, target_BPK)
    z_BPZ = posterior_draw(mean_BPZ, log_std_BPZ, stages.example_keys(key, batch["index"]))
    found = scores(params, z_BPZ, target_BPK)
    kl_BPZ = autoencoding.kl_to_standard_normal(mean_BPZ, log_std_BPZ)
    return {
      "token_accuracy": jnp.mean(found.right, axis=(1, 2)),
      "patch_accuracy": jnp.mean(jnp.min(found.right, axis=2), axis=1),
      "cross_entropy": jnp.mean(found.cross_entropy, axis=(1, 2)),
      "posterior_std": jnp.mean(jnp.exp(log_std_BPZ), axis=1),
      "kl": jnp.mean(kl_BPZ, axis=1),
    }

  def summarize(scores):
    std_Z, kl_Z = scores["posterior_std"].mean(axis=0), scores["kl"].mean(axis=0)
    names = ("token_accuracy", "patch_accuracy", "cross_entropy")
    return stages.with_stderr(scores, *names) | {
      "posterior_std": float(std_Z.mean()),
      "active_dimensions": int((kl_Z > settings.kl_floor).sum()),
      "latent_dimensions": len(kl_Z),
      "posterior_std_by_dimension": [round(float(x), 5) for x in std_Z],
      "kl_by_dimension": [round(float(x), 5) for x in kl_Z],
    }

  return stages.Stage(model.initial, loss, evaluate, summarize, frozen={})
