"""Stage one: patches -> latents -> patches."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax import config
from calm_jax.figures import HIGHER, LOWER, Figure
from calm_jax.interchange import to_onnx, to_reference, to_stablehlo, to_torch
from calm_jax.kernels import cross_entropy
from calm_jax.models import autoencoder, flops, layers
from calm_jax.objectives import autoencoding
from calm_jax.parallel import mesh
from calm_jax.reporting import presentation
from calm_jax.stages import spec
from calm_jax.training import stage


@dataclasses.dataclass(frozen=True)
class Run(config.Run):
  """Stage one: patches -> latents -> patches."""

  stage: Literal["autoencoder"] = "autoencoder"
  model: config.Autoencoder = dataclasses.field(default_factory=config.Autoencoder)
  loss: config.AutoencodingLoss = dataclasses.field(default_factory=config.AutoencodingLoss)


@dataclasses.dataclass(frozen=True)
class _Functions:
  """Stage one's functions for the training loop."""

  model: autoencoder.Autoencoder
  settings: config.AutoencodingLoss

  def _encode(self, params, token_BPK):
    """Returns the posteriors of patches: mean and log of the std, [B, P, Z] each."""

    def encode_example(token_PK):
      return layers.apply(self.model, params, token_PK, method="encode")

    return mesh.map_examples(encode_example, broadcasts=True)(token_BPK)

  def _draw(self, mean_BPZ, log_std_BPZ, key_B):
    """Returns one draw of each posterior, [B, P, Z]."""
    draw = jax.vmap(autoencoding.posterior_draws, in_axes=(0, 0, 0, None))
    return draw(key_B, mean_BPZ, log_std_BPZ, 1)[:, 0]

  def _score(self, params, z_BPZ, target_BPK) -> cross_entropy.Scores:
    """Returns the scores of decoding latents, [B, P, K] each; the loss is their mean."""

    def decode_example(z_PZ):
      return layers.apply(self.model, params, z_PZ, method="features")

    feature_BPKE = mesh.map_examples(decode_example, broadcasts=True)(z_BPZ)
    feature_BSE = feature_BPKE.reshape(len(feature_BPKE), -1, self.model.sizes.width)
    target_BS = target_BPK.reshape(len(target_BPK), -1)
    weight_BS = jnp.full(target_BS.shape, 1 / target_BS.size)
    table_VE = params["embed"]["embedding"]
    scores = cross_entropy.scores(table_VE, feature_BSE, target_BS, weight_BS)
    return scores._replace(
      cross_entropy=scores.cross_entropy.reshape(target_BPK.shape),
      right=scores.right.reshape(target_BPK.shape),
    )

  def loss(self, params, frozen, batch, key):
    """Returns the loss K * cross-entropy + kl_weight * KL, nats per patch, and metrics."""
    settings, size = self.settings, self.model.sizes.patch_size
    target_BPK = stage.patches(batch["tokens"], size)
    token_key_B, noise_key_B, latent_key_B = jax.vmap(
      lambda key: jax.random.split(key, 3), out_axes=1
    )(stage.example_keys(key, batch["index"]))
    drop = jax.vmap(autoencoding.drop_tokens, in_axes=(0, 0, None, None))
    input_BPK = drop(token_key_B, target_BPK, settings.drop_token, settings.drop_token_id)
    mean_BPZ, log_std_BPZ = self._encode(params, input_BPK)
    z_BPZ = self._draw(mean_BPZ, log_std_BPZ, noise_key_B)
    drop = jax.vmap(autoencoding.drop_latents, in_axes=(0, 0, None))
    scores = self._score(params, drop(latent_key_B, z_BPZ, settings.drop_latent), target_BPK)
    kl = jnp.mean(autoencoding.floored_kl(mean_BPZ, log_std_BPZ, settings.kl_floor))
    metrics = {
      "tokens": jnp.float32(target_BPK.size),
      "patches_per_token": jnp.float32(1 / size),
      "cross_entropy": scores.loss,
      "kl": kl,
      "token_accuracy": jnp.mean(scores.right),
      "posterior_std": jnp.mean(jnp.exp(log_std_BPZ)),
    }
    return size * scores.loss + settings.kl_weight * kl, metrics

  def evaluate(self, params, frozen, batch, key):
    """Returns scores of each example, with one draw of each posterior and no dropout."""
    target_BPK = stage.patches(batch["tokens"], self.model.sizes.patch_size)
    mean_BPZ, log_std_BPZ = self._encode(params, target_BPK)
    z_BPZ = self._draw(mean_BPZ, log_std_BPZ, stage.example_keys(key, batch["index"]))
    scores = self._score(params, z_BPZ, target_BPK)
    kl_BPZ = autoencoding.kl_to_standard_normal(mean_BPZ, log_std_BPZ)
    return {
      "token_accuracy": jnp.mean(scores.right, axis=(1, 2)),
      "patch_accuracy": jnp.mean(jnp.min(scores.right, axis=2), axis=1),
      "cross_entropy": jnp.mean(scores.cross_entropy, axis=(1, 2)),
      "posterior_std": jnp.mean(jnp.exp(log_std_BPZ), axis=1),
      "kl": jnp.mean(kl_BPZ, axis=1),
    }

  def summarize(self, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the figures of all examples' scores."""
    std_Z, kl_Z = scores["posterior_std"].mean(axis=0), scores["kl"].mean(axis=0)
    names = ("token_accuracy", "patch_accuracy", "cross_entropy")
    return stage.with_stderr(scores, *names) | {
      "posterior_std": float(std_Z.mean()),
      "active_dimensions": int((kl_Z > self.settings.kl_floor).sum()),
      "latent_dimensions": len(kl_Z),
      "posterior_std_by_dimension": [round(float(x), 5) for x in std_Z],
      "kl_by_dimension": [round(float(x), 5) for x in kl_Z],
    }


def _stage(run: Run, model: autoencoder.Autoencoder, parents: spec.Parents) -> stage.Stage:
  functions = _Functions(model, run.loss)
  return stage.Stage(model.initial, functions.loss, functions.evaluate, functions.summarize)


def _model(run: Run, parents: spec.Parents, vocab_size: int, dtype: Any) -> autoencoder.Autoencoder:
  return autoencoder.Autoencoder(run.model, vocab_size, jnp.dtype(dtype))


def _check(run: Run, parents: spec.ParentRuns, vocab_size: int, labels: spec.ParentLabels) -> None:
  replacement = run.loss.drop_token_id
  config.require(
    0 <= replacement < vocab_size,
    f"config.loss.drop_token_id must lie in [0, {vocab_size}), the vocabulary, got {replacement}",
  )


def _flops(run: Run, parents: spec.ParentRuns, vocab_size: int) -> dict[str, float]:
  trunk = flops.decoder_per_patch(run.model, 0)
  return {
    "encoder": 3 * flops.encoder_per_patch(run.model),
    "decoder": 3 * trunk,
    "vocabulary": 3 * (flops.decoder_per_patch(run.model, vocab_size) - trunk),
  }


def _pictures():
  from calm_jax.reporting import autoencoder_pictures, training_pictures

  return (*autoencoder_pictures.PICTURES, *training_pictures.PICTURES)


_FIGURES = (
  Figure("token_accuracy", "Token accuracy", "%", HIGHER, 100, console="value"),
  Figure("patch_accuracy", "Patch accuracy", "%", HIGHER, 100, console="value"),
  Figure("cross_entropy", "Cross-entropy", "nats a token", LOWER),
  Figure("posterior_std", "Posterior std, mean", "latent unit", "1 is the prior's"),
  Figure("active_dimensions", "Active dimensions", "dimensions", "KL above the floor"),
  Figure("latent_dimensions", "Latent dimensions", "dimensions", "Z, the size of the latent"),
)

_METRICS = (
  Figure("cross_entropy", "Cross-entropy", "nats a token", LOWER),
  Figure("token_accuracy", "Token accuracy", "share", HIGHER, console="value"),
  Figure("kl", "KL to the prior, floored", "nats a patch", LOWER, console="value"),
  Figure("posterior_std", "Posterior std, mean", "latent unit", "1 is the prior's"),
)

SPEC = spec.Spec(
  run=Run,
  title="an autoencoder",
  patch_size=lambda run: run.model.patch_size,
  model=_model,
  stage=_stage,
  check=_check,
  flops=_flops,
  program_flops=lambda *arguments: sum(_flops(*arguments).values()),
  unshaped=lambda run: frozenset({"model.init"}),
  presentation=presentation.Presentation(
    heading="Stage 1: autoencoder",
    title="CALM autoencoder",
    settings=(
      "model.patch_size",
      "model.width",
      "model.ffn",
      "model.encoder_layers",
      "model.decoder_layers",
      "model.latent",
      "model.init",
      "loss.kl_weight",
      "loss.kl_floor",
      "loss.drop_token",
      "loss.drop_latent",
    ),
    metrics=lambda run: _METRICS,
    figures=_FIGURES,
    loss_unit=lambda run: "nats a patch",
    pictures=_pictures,
    brief=lambda run: (
      f"K = {run.model.patch_size}, width {run.model.width}, latent {run.model.latent}"
    ),
    summary={"ae_token_accuracy": "token_accuracy", "ae_patch_accuracy": "patch_accuracy"},
  ),
  writers={
    "reference": to_reference.write_autoencoder,
    "torch": to_torch.write_autoencoder,
    "stablehlo": to_stablehlo.write_autoencoder,
    "onnx": to_onnx.write_autoencoder,
  },
)
