"""Stage two for the loop: tokens -> hidden -> samples of the next latent."""

from typing import Any

import jax
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import autoencoder, calm, layers, memory
from calm_jax.objectives import brier, energy_score, head_losses
from calm_jax.parallel import mesh
from calm_jax.training import stages

Params = Any


def build(
  run: config.CalmRun, codec: autoencoder.Autoencoder, frozen: Params, vocab_size: int
) -> stages.Stage:
  """Returns stage two over a frozen autoencoder `codec` with parameters `frozen`."""
  model = calm.Calm.build(run, codec, vocab_size)
  size, settings = codec.sizes.patch_size, run.loss
  draws = jax.vmap(calm.posterior_draws, in_axes=(0, 0, 0, None))
  patch_loss = head_losses.LOSSES[run.head.kind]

  def read(frozen, batch, key):
    """Patches [B, P, K], their posteriors, the backbone's latents, the examples' keys."""
    token_BPK = stages.patches(batch["tokens"], size)

    def encode(token_PK):
      return layers.apply(codec, frozen, token_PK, method="encode")

    mean_BPZ, log_std_BPZ = mesh.examples(encode, broadcasts=True)(token_BPK)
    key_B, latent_BPZ = stages.example_keys(key, batch["index"]), None
    if run.model.reads_latents:
      latent_BPZ = draws(stages.other_keys(key_B, 0), mean_BPZ, log_std_BPZ, 1)[:, 0]
    return token_BPK, (mean_BPZ, log_std_BPZ), latent_BPZ, key_B

  def hidden(params, token_BPK, latent_BPZ, known=None):
    """Hidden states of all patches but the last, which predict all but the first."""
    latent_BPZ = None if latent_BPZ is None else latent_BPZ[:, :-1]
    return model.hidden(params, token_BPK[:, :-1], latent_BPZ, known)

  def loss(params, frozen, batch, key):
    token_BPK, posterior_BPZ, latent_BPZ, key_B = read(frozen, batch, key)
    hidden_BPD, _ = model.hidden(params, token_BPK, latent_BPZ)

    def one(hidden_PD, mean_PZ, log_std_PZ, key):
      posterior = (mean_PZ, log_std_PZ)
      return patch_loss(model.head, params["head"], hidden_PD, posterior, key, settings)

    targets = map(stages.next_position, posterior_BPZ)
    loss_BP, figures = mesh.examples(one)(hidden_BPD, *targets, stages.other_keys(key_B, 1))
    metrics = {
      "tokens": jnp.float32(token_BPK[:, 1:].size),
      "patches_per_token": jnp.float32(1 / size),
    }
    return stages.mean_of_known(loss_BP), metrics | jax.tree.map(stages.mean_of_known, figures)

  def samples(params, frozen, hidden_BPD, key_B):
    """N latents of every patch [B, N, P, Z], and their tokens [B, N, P, K]."""

    def one(hidden_PD, key):
      return model.sample(params, hidden_PD, key, settings.samples)

    sample_BNPZ = mesh.examples(one)(hidden_BPD, key_B)
    chunk = max(1, calm.DECODE_CHUNK // mesh.own_examples(len(key_B)))

    def tokens(sample_NPZ):
      return calm.decode_tokens(codec, frozen, sample_NPZ, chunk)

    return sample_BNPZ, mesh.examples(tokens)(sample_BNPZ)

  def evaluate(params, frozen, batch, key):
    token_BPK, (mean_BPZ, log_std_BPZ), latent_BPZ, key_B = read(frozen, batch, key)
    count = token_BPK.shape[1] - 1
    spanned = brier.patches_spanned(size)
    cache = memory.Cache.empty(count) if spanned > 1 else None
    hidden_BPD, cache = hidden(params, token_BPK, latent_BPZ, cache)
    sample_BNPZ, token_BNPK = samples(params, frozen, hidden_BPD, stages.other_keys(key_B, 2))

    accuracy_BPK = jax.vmap(brier.accuracy)(token_BNPK, token_BPK[:, 1:])
    starts = count - spanned + 1  # Predicted patches from which on there are 4 tokens.
    accuracies = [accuracy_BPK[:, patch : patch + starts] for patch in range(spanned)]
    accuracy_BPn = brier.chain(accuracies, [share_BPK[..., -1] for share_BPK in accuracies[:-1]])
    collision_BPn = brier.chain(
      *_collisions(
        params, frozen, cache, sample_BNPZ[:, :, :starts], token_BNPK[:, :, :starts], key_B, spanned
      )
    )

    def distance(sample_BNPZ, mean_BPZ, log_std_BPZ):
      posterior = (mean_BPZ, jnp.exp(log_std_BPZ))
      return jax.vmap(energy_score.expected_attraction, in_axes=(0, 0, 0, None))(
        sample_BNPZ, *posterior, settings.alpha
      )

    true_BP = distance(sample_BNPZ, mean_BPZ[:, 1:], log_std_BPZ[:, 1:])
    shifted_BP = distance(sample_BNPZ[:, :, :-1], mean_BPZ[:, 2:], log_std_BPZ[:, 2:])
    repulsion = jax.vmap(energy_score.repulsion, in_axes=(0, None))
    energy_BP = 2 * true_BP - repulsion(sample_BNPZ, settings.alpha)
    return {
      "accuracy": jnp.mean(accuracy_BPn, axis=1),
      "collision": jnp.mean(collision_BPn, axis=1),
      "energy": jnp.mean(energy_BP, axis=1),
      "conditioning_gap": jnp.mean(2 * (shifted_BP - true_BP[:, :-1]), axis=1),
    }

  def _collisions(params, frozen, cache, sample_BNPZ, token_BNPK, key_B, spanned):
    """Collisions within each patch along the first sample's path, from all starts at once.

    Returns:
      (within, whole) for `brier.chain`.
    """
    within, whole = [jax.vmap(brier.collision)(token_BNPK)], []
    branches = memory.Branches.of(cache, token_BNPK.shape[2]) if spanned > 1 else None
    for patch in range(1, spanned):
      whole.append(jax.vmap(brier.repeats)(token_BNPK))
      latent_BPZ = sample_BNPZ[:, 0] if run.model.reads_latents else None
      hidden_BPD, branches = model.hidden(params, token_BNPK[:, 0], latent_BPZ, branches)
      sample_BNPZ, token_BNPK = samples(
        params, frozen, hidden_BPD, stages.other_keys(key_B, 2 + patch)
      )
      within.append(jax.vmap(brier.collision)(token_BNPK))
    return within, whole

  def summarize(scores):
    result = brier.summary(scores["accuracy"], scores["collision"])
    return result | stages.with_stderr(scores, "energy", "conditioning_gap")

  return stages.Stage(model.init, loss, evaluate, summarize, frozen)
