"""What the loop needs to know about a stage, as pure functions: one row a stage."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import autoencoder, calm, layers
from calm_jax.objectives import autoencoding, brier, energy_score
from calm_jax.training import step

Params = Any
Batch = Mapping[str, jax.Array]
# One array a score, one row an example: [B, ...].
Scores = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of training.

  A batch is {"tokens": int32 [B, S], "index": int32 [B]}. All noise of an
  example is keyed by its index in the global stream, so that neither
  accumulation nor the number of hosts changes it.

  Attributes:
    init: key -> trained parameters.
    loss: (params, frozen, batch, key) -> (mean loss, metrics); see `step.Loss`.
    evaluate: (params, frozen, batch, key) -> scores of each example.
    summarize: scores of all examples -> the figures that are reported.
    frozen: parameters that the stage reads and never trains.
  """

  init: Callable[[jax.Array], Params]
  loss: step.Loss
  evaluate: Callable[[Params, Params, Batch, jax.Array], Scores]
  summarize: Callable[[Mapping[str, np.ndarray]], dict[str, Any]]
  frozen: Params


def example_keys(key: jax.Array, index_B: jax.Array) -> jax.Array:
  """Returns one key an example, from its index in the global stream."""
  return jax.vmap(lambda index: jax.random.fold_in(key, index))(index_B)


def patches(token_BS: jax.Array, patch_size: int) -> jax.Array:
  """[B, S] -> [B, P, K]."""
  return token_BS.reshape(token_BS.shape[0], -1, patch_size)


def per_example(draw: Callable[[jax.Array], jax.Array], key_B: jax.Array, axis: int) -> jax.Array:
  """Returns draw(key) of each example, stacked along `axis`."""
  return jax.vmap(draw, out_axes=axis)(key_B)


def autoencoder_stage(run: config.AutoencoderRun, vocab_size: int) -> Stage:
  """Returns stage one."""
  dtype = jnp.dtype(run.training.compute_dtype)
  model = autoencoder.Autoencoder(run.model, vocab_size, dtype)
  size, settings = run.model.patch_size, run.loss

  def encode(params, token_BPK):
    return layers.apply(model, params, token_BPK, method="encode")

  def decode(params, z_BPZ):
    return layers.apply(model, params, z_BPZ, method="decode")

  def posterior_draw(mean_BPZ, log_std_BPZ, key_B):
    eps_BPZ = per_example(lambda key: jax.random.normal(key, mean_BPZ.shape[1:]), key_B, 0)
    return mean_BPZ + jnp.exp(log_std_BPZ) * eps_BPZ

  def loss(params, frozen, batch, key):
    target_BPK = patches(batch["tokens"], size)
    token_key_B, noise_key_B, latent_key_B = jax.vmap(
      lambda key: jax.random.split(key, 3), out_axes=1
    )(example_keys(key, batch["index"]))
    drop = jax.vmap(autoencoding.drop_tokens, in_axes=(0, 0, None, None))
    input_BPK = drop(token_key_B, target_BPK, settings.drop_token, settings.drop_token_id)
    mean_BPZ, log_std_BPZ = encode(params, input_BPK)
    z_BPZ = posterior_draw(mean_BPZ, log_std_BPZ, noise_key_B)
    drop = jax.vmap(autoencoding.drop_latents, in_axes=(0, 0, None))
    logits_BPKV = decode(params, drop(latent_key_B, z_BPZ, settings.drop_latent))
    cross_entropy = jnp.mean(autoencoding.cross_entropy(logits_BPKV, target_BPK))
    kl = jnp.mean(autoencoding.floored_kl(mean_BPZ, log_std_BPZ, settings.kl_floor))
    metrics = {
      "tokens": jnp.float32(target_BPK.size),
      "patches_per_token": jnp.float32(1 / size),
      "cross_entropy": cross_entropy,
      "kl": kl,
      "token_accuracy": jnp.mean(jnp.argmax(logits_BPKV, axis=-1) == target_BPK),
      "posterior_std": jnp.mean(jnp.exp(log_std_BPZ)),
    }
    return size * cross_entropy + settings.kl_weight * kl, metrics

  def evaluate(params, frozen, batch, key):
    target_BPK = patches(batch["tokens"], size)
    mean_BPZ, log_std_BPZ = encode(params, target_BPK)
    z_BPZ = posterior_draw(mean_BPZ, log_std_BPZ, example_keys(key, batch["index"]))
    logits_BPKV = decode(params, z_BPZ)
    right_BPK = jnp.argmax(logits_BPKV, axis=-1) == target_BPK
    kl_BPZ = autoencoding.kl_to_standard_normal(mean_BPZ, log_std_BPZ)
    return {
      "token_accuracy": jnp.mean(right_BPK, axis=(1, 2)),
      "patch_accuracy": jnp.mean(jnp.all(right_BPK, axis=2), axis=1),
      "cross_entropy": jnp.mean(autoencoding.cross_entropy(logits_BPKV, target_BPK), axis=(1, 2)),
      "posterior_std": jnp.mean(jnp.exp(log_std_BPZ), axis=1),
      "kl": jnp.mean(kl_BPZ, axis=1),
    }

  def summarize(scores):
    std_Z, kl_Z = scores["posterior_std"].mean(axis=0), scores["kl"].mean(axis=0)
    result: dict[str, Any] = {}
    for name in ("token_accuracy", "patch_accuracy", "cross_entropy"):
      result[name] = float(scores[name].mean())
      result[f"{name}_stderr"] = brier.jackknife(scores[name], lambda mean: mean)
    return result | {
      "posterior_std": float(std_Z.mean()),
      "active_dimensions": int((kl_Z > settings.kl_floor).sum()),
      "latent_dimensions": len(kl_Z),
      "posterior_std_by_dimension": [round(float(x), 5) for x in std_Z],
      "kl_by_dimension": [round(float(x), 5) for x in kl_Z],
    }

  def init(key):
    return model.init(key, jnp.zeros((1, size), jnp.int32))["params"]

  return Stage(init, loss, evaluate, summarize, frozen={})


def calm_stage(run: config.CalmRun, codec: autoencoder.Autoencoder, frozen: Params) -> Stage:
  """Returns stage two over a frozen autoencoder `codec` with parameters `frozen`."""
  model = calm.Calm.build(run, codec)
  size, settings = codec.sizes.patch_size, run.loss

  def predictions(params, frozen, batch, key):
    """Samples and posterior draws of every predicted patch (1 to P - 1), noise by example."""
    token_BPK = patches(batch["tokens"], size)
    target_BPK = token_BPK[:, 1:]
    hidden_BPD, _ = model.hidden(params, token_BPK[:, :-1])
    mean_BPZ, log_std_BPZ = layers.apply(codec, frozen, target_BPK, method="encode")
    noise_key_B, target_key_B = jax.vmap(jax.random.split, out_axes=1)(
      example_keys(key, batch["index"])
    )
    count = target_BPK.shape[1]
    noise_NBPR = per_example(
      lambda key: model.head.draw_noise(key, (settings.samples, count)), noise_key_B, 1
    )
    draws = (settings.posterior_draws, count, codec.sizes.latent)
    eps_MBPZ = per_example(lambda key: jax.random.normal(key, draws), target_key_B, 1)
    sample_NBPZ = model.samples(params, hidden_BPD, noise_NBPR)
    target_MBPZ = mean_BPZ[None] + jnp.exp(log_std_BPZ)[None] * eps_MBPZ
    return sample_NBPZ, target_MBPZ, target_BPK

  def loss(params, frozen, batch, key):
    sample_NBPZ, target_MBPZ, target_BPK = predictions(params, frozen, batch, key)
    energy = jnp.mean(energy_score.energy_loss(sample_NBPZ, target_MBPZ, settings.alpha))
    metrics = {
      "tokens": jnp.float32(target_BPK.size),
      "patches_per_token": jnp.float32(1 / size),
      "repulsion": jnp.mean(
        jax.lax.stop_gradient(energy_score.repulsion(sample_NBPZ, settings.alpha))
      ),
    }
    return energy, metrics | {"attraction": (energy + metrics["repulsion"]) / 2}

  def evaluate(params, frozen, batch, key):
    sample_NBPZ, target_MBPZ, target_BPK = predictions(params, frozen, batch, key)
    token_NBPK = calm.decode_tokens(codec, frozen, sample_NBPZ)
    accuracy_BPn, collision_BPn = jax.vmap(brier.accuracy_and_collision, in_axes=(1, 0))(
      token_NBPK, target_BPK
    )
    true_BP = energy_score.attraction(sample_NBPZ, target_MBPZ, settings.alpha)
    shifted_BP = energy_score.attraction(
      sample_NBPZ[:, :, :-1], target_MBPZ[:, :, 1:], settings.alpha
    )
    repulsion_BP = energy_score.repulsion(sample_NBPZ, settings.alpha)
    return {
      "accuracy": jnp.mean(accuracy_BPn, axis=1),
      "collision": jnp.mean(collision_BPn, axis=1),
      "energy": jnp.mean(2 * true_BP - repulsion_BP, axis=1),
      "conditioning_gap": jnp.mean(2 * (shifted_BP - true_BP[:, :-1]), axis=1),
    }

  def summarize(scores):
    result = brier.summary(scores["accuracy"], scores["collision"])
    for name in ("energy", "conditioning_gap"):
      result[name] = float(scores[name].mean())
      result[f"{name}_stderr"] = brier.jackknife(scores[name], lambda mean: mean)
    return result

  return Stage(model.init, loss, evaluate, summarize, frozen)
