"""Stage two: tokens -> hidden -> samples of the next latent, over a frozen autoencoder."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax import config, errors
from calm_jax.figures import HIGHER, LOWER, Figure
from calm_jax.generation import cost, laws, tradeoff, writing
from calm_jax.interchange import to_onnx, to_reference, to_stablehlo, to_torch
from calm_jax.kernels import cross_entropy
from calm_jax.models import autoencoder, calm, flops, layers, memory
from calm_jax.models.heads import registry
from calm_jax.objectives import autoencoding, brier, energy_score
from calm_jax.parallel import mesh
from calm_jax.reporting import presentation
from calm_jax.stages import spec, transformer
from calm_jax.training import stage

Params = Any

# Purpose of an example's key, above those of evaluation's patches.
_TOKENS = 15


@dataclasses.dataclass(frozen=True)
class Run(config.Run):
  """Stage two: the language model over the latents of a trained autoencoder.

  Attributes:
    autoencoder: stage one's workdir. Its weights are copied into this run's workdir at the
      start; the original is not needed after that. Empty with `start_from`, whose autoencoder
      is used.
  """

  stage: Literal["calm"] = "calm"
  autoencoder: str = ""
  model: config.Backbone = dataclasses.field(default_factory=config.Backbone)
  head: config.Head = dataclasses.field(default_factory=config.Head)
  loss: config.CalmLoss = dataclasses.field(default_factory=config.CalmLoss)


@dataclasses.dataclass(frozen=True)
class Text:
  """A batch as stage two reads it.

  Attributes:
    token_BPK: patches.
    posterior_BPZ: mean and log of the std of their latents.
    latent_BPZ: draws of the posteriors; None if the backbone reads no latents.
    key_B: one key per example.
  """

  token_BPK: jax.Array
  posterior_BPZ: tuple[jax.Array, jax.Array]
  latent_BPZ: jax.Array | None
  key_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Functions:
  """Stage two's functions for the training loop; `frozen` are the autoencoder's parameters."""

  run: Run
  model: calm.Calm
  autoencoder: autoencoder.Autoencoder

  @property
  def _patch_size(self) -> int:
    return self.run.model.patch_size

  def encode(self, frozen, token_BPK) -> tuple[jax.Array, jax.Array]:
    """Returns the posteriors of patches: mean and log of the std, [B, P, Z] each."""

    def encode_example(token_PK):
      return layers.apply(self.autoencoder, frozen, token_PK, method="encode")

    return mesh.map_examples(encode_example, broadcasts=True)(token_BPK)

  def read(self, frozen, batch, key) -> Text:
    """Returns a batch's patches, their posteriors and the latents that the backbone reads."""
    token_BPK = stage.patches(batch["tokens"], self._patch_size)
    posterior_BPZ = self.encode(frozen, token_BPK)
    key_B, latent_BPZ = stage.example_keys(key, batch["index"]), None
    if self.run.model.reads_latents:
      draws = jax.vmap(autoencoding.posterior_draws, in_axes=(0, 0, 0, None))
      mean_BPZ, log_std_BPZ = posterior_BPZ
      latent_BPZ = draws(stage.purpose_keys(key_B, 0), mean_BPZ, log_std_BPZ, 1)[:, 0]
    return Text(token_BPK, posterior_BPZ, latent_BPZ, key_B)

  def loss(self, params, frozen, batch, key):
    """Returns the head's loss, averaged over the patches that have a next one, and metrics."""
    text = self.read(frozen, batch, key)
    hidden_BPD, _ = self.model.hidden(params, text.token_BPK, text.latent_BPZ)

    def head_loss(hidden_PD, mean_PZ, log_std_PZ, key):
      posterior, head = (mean_PZ, log_std_PZ), self.model.head
      return head.loss(params["head"], hidden_PD, posterior, key, self.run.loss)

    targets = map(stage.next_position, text.posterior_BPZ)
    keys = stage.purpose_keys(text.key_B, 1)
    loss_BP, figures = mesh.map_examples(head_loss)(hidden_BPD, *targets, keys)
    loss, figures = jax.tree.map(stage.mean_with_next, (loss_BP, figures))
    if self.model.token_maps is not None:
      target_BPK = stage.next_position(text.token_BPK)
      keys = stage.purpose_keys(text.key_B, _TOKENS)
      token_loss = self._token_scores(params, frozen, hidden_BPD, target_BPK, keys).loss
      loss += self.run.loss.token_weight * token_loss
      figures["token_cross_entropy"] = token_loss
    metrics = {
      "tokens": jnp.float32(text.token_BPK[:, 1:].size),
      "patches_per_token": jnp.float32(1 / self._patch_size),
    }
    return loss, metrics | figures

  def _token_scores(
    self, params, frozen, hidden_BPD, target_BPK, key_B=None
  ) -> cross_entropy.Scores:
    """Returns the scores of the tokens of the patches that hidden states predict, [B, P·K] each.

    The loss is the mean over the patches that have a next one; with keys, an unbiased estimate of
    it from one position in `token_every`.
    """
    maps = self.model.token_maps
    assert maps is not None
    mask_BP = stage.has_next(target_BPK[..., 0])
    weight_BP = mask_BP / mask_BP.sum()
    if key_B is not None:
      every = self.run.loss.token_every
      pick = functools.partial(stage.one_in, every, key_B=key_B)
      hidden_BPD, target_BPK, weight_BP = map(pick, (hidden_BPD, target_BPK, every * weight_BP))

    def features(hidden_PD):
      return layers.apply(maps, params["token_maps"], hidden_PD)

    feature_BPKE = mesh.map_examples(features, broadcasts=True)(hidden_BPD)
    feature_BSE, target_BS = (
      x.reshape(len(x), -1, *x.shape[3:]) for x in (feature_BPKE, target_BPK)
    )
    weight_BS = jnp.repeat(weight_BP / self._patch_size, self._patch_size, axis=1)
    return cross_entropy.scores(frozen["embed"]["embedding"], feature_BSE, target_BS, weight_BS)

  def _samples(self, params, frozen, hidden_BPD, key_B):
    """Returns N sampled latents of every patch [B, N, P, Z] and their tokens [B, N, P, K]."""
    sample_BNPZ = self.draws(params, hidden_BPD, key_B, self.run.loss.samples)
    return sample_BNPZ, self.decode(frozen, sample_BNPZ)

  def draws(self, params, hidden_BPD, key_B, count: int) -> jax.Array:
    """Returns `count` (N) sampled latents of every patch, [B, N, P, Z]."""

    def sample_example(hidden_PD, key):
      return self.model.sample(params, hidden_PD, key, count)

    return mesh.map_examples(sample_example)(hidden_BPD, key_B)

  def decode(self, frozen, sample_BNPZ) -> jax.Array:
    """Returns the most likely tokens of latents, [B, N, P, K]."""
    chunk = max(1, calm.DECODE_CHUNK // mesh.own_examples(len(sample_BNPZ)))

    def decode_example(sample_NPZ):
      return calm.decode_tokens(self.autoencoder, frozen, sample_NPZ, chunk)

    return mesh.map_examples(decode_example)(sample_BNPZ)

  def evaluate(self, params, frozen, batch, key):
    """Returns scores of each example: BrierLM's terms, energy score and conditioning gap."""
    text, spanned = self.read(frozen, batch, key), brier.patches_spanned(self._patch_size)
    count = text.token_BPK.shape[1] - 1
    cache = memory.Cache.empty(count) if spanned > 1 else None
    # The last patch predicts nothing, and the first is not predicted.
    latent_BPZ = None if text.latent_BPZ is None else text.latent_BPZ[:, :-1]
    hidden_BPD, cache = self.model.hidden(params, text.token_BPK[:, :-1], latent_BPZ, cache)
    keys = stage.purpose_keys(text.key_B, 2)
    sample_BNPZ, token_BNPK = self._samples(params, frozen, hidden_BPD, keys)
    starts = count - spanned + 1  # Predicted patches from which 4 tokens of the text follow.
    start_samples = (sample_BNPZ[:, :, :starts], token_BNPK[:, :, :starts])
    terms = self._collisions(params, frozen, cache, start_samples, text.key_B, spanned)
    energy_BP, gap_BP = self._energy(sample_BNPZ, text.posterior_BPZ)
    accuracy_BPn = self._accuracy(token_BNPK, text.token_BPK[:, 1:], starts, spanned)
    scores = {
      "accuracy": jnp.mean(accuracy_BPn, axis=1),
      "collision": jnp.mean(brier.chain(*terms), axis=1),
      "energy": jnp.mean(energy_BP, axis=1),
      "conditioning_gap": jnp.mean(gap_BP, axis=1),
    }
    if self.model.token_maps is not None:
      padded_BPD = jnp.pad(hidden_BPD, ((0, 0), (0, 1), (0, 0)))  # A mesh divides all P positions.
      target_BPK = stage.next_position(text.token_BPK)
      nats_BS = self._token_scores(params, frozen, padded_BPD, target_BPK).cross_entropy
      scores["token_cross_entropy"] = jnp.mean(nats_BS[:, : count * self._patch_size], axis=1)
    return scores

  def _accuracy(self, token_BNPK, target_BPK, starts: int, spanned: int) -> jax.Array:
    """Returns the shares of samples whose first n tokens are the text's, n = 1 to 4: [B, P, n]."""
    share_BPK = jax.vmap(brier.accuracy)(token_BNPK, target_BPK)
    within = [share_BPK[:, patch : patch + starts] for patch in range(spanned)]
    return brier.chain(within, [patch_BPK[..., -1] for patch_BPK in within[:-1]])

  def _collisions(self, params, frozen, cache, start_samples, key_B, spanned: int):
    """Returns the collision terms along the first sample's path, from all starts at once.

    Args:
      start_samples: latents [B, N, P, Z] and tokens [B, N, P, K] of the first patch.

    Returns:
      (within, whole) for `brier.chain`.
    """
    sample_BNPZ, token_BNPK = start_samples
    within, whole = [jax.vmap(brier.collision)(token_BNPK)], []
    branches = memory.Branches.of(cache, token_BNPK.shape[2]) if spanned > 1 else None
    for patch in range(1, spanned):
      whole.append(jax.vmap(brier.repeats)(token_BNPK))
      latent_BPZ = sample_BNPZ[:, 0] if self.run.model.reads_latents else None
      hidden_BPD, branches = self.model.hidden(params, token_BNPK[:, 0], latent_BPZ, branches)
      keys = stage.purpose_keys(key_B, 2 + patch)
      sample_BNPZ, token_BNPK = self._samples(params, frozen, hidden_BPD, keys)
      within.append(jax.vmap(brier.collision)(token_BNPK))
    return within, whole

  def _energy(self, sample_BNPZ, posterior_BPZ) -> tuple[jax.Array, jax.Array]:
    """Returns the energy score [B, P] and the conditioning gap [B, P-1], latent unit^alpha.

    The gap is the rise of the score if each sample is scored on the next position's target.
    Lower scores and larger gaps are better.
    """
    alpha, (mean_BPZ, log_std_BPZ) = self.run.loss.alpha, posterior_BPZ

    def distance(sample_BNPZ, mean_BPZ, log_std_BPZ):
      attraction = jax.vmap(energy_score.expected_attraction, in_axes=(0, 0, 0, None))
      return attraction(sample_BNPZ, mean_BPZ, jnp.exp(log_std_BPZ), alpha)

    true_BP = distance(sample_BNPZ, mean_BPZ[:, 1:], log_std_BPZ[:, 1:])
    shifted_BP = distance(sample_BNPZ[:, :, :-1], mean_BPZ[:, 2:], log_std_BPZ[:, 2:])
    repulsion_BP = jax.vmap(energy_score.repulsion, in_axes=(0, None))(sample_BNPZ, alpha)
    return 2 * true_BP - repulsion_BP, 2 * (shifted_BP - true_BP[:, :-1])

  def summarize(self, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the figures from the scores of all examples."""
    result = brier.summary(scores["accuracy"], scores["collision"])
    means = ("energy", "conditioning_gap", "token_cross_entropy")
    return result | stage.with_stderr(scores, *(name for name in means if name in scores))


def _stage(run: Run, model: calm.Calm, parents: spec.Parents) -> stage.Stage:
  parent = parents["autoencoder"]
  functions = Functions(run, model, parent.model)
  return stage.Stage(
    model.initial, functions.loss, functions.evaluate, functions.summarize, parent.params
  )


def _model(run: Run, parents: spec.Parents, vocab_size: int, dtype: Any) -> calm.Calm:
  sizes, token_loss = parents["autoencoder"].run.model, run.loss.token_weight > 0
  return calm.Calm.build(
    run.model, run.head, sizes, vocab_size, jnp.dtype(dtype), run.execution, token_loss
  )


def _check(run: Run, parents: spec.ParentRuns, vocab_size: int, labels: spec.ParentLabels) -> None:
  """Raises CalmError unless K is its autoencoder's and `token_every` divides the positions."""
  positions, every = run.data.context // run.model.patch_size, run.loss.token_every
  config.require(
    run.loss.token_weight == 0 or positions % every == 0,
    f"config.loss.token_every must divide the {positions} patches of an example, got {every}",
  )
  own_k, parent_k = run.model.patch_size, parents["autoencoder"].model.patch_size
  if own_k == parent_k:
    return
  (name, flag), context = labels["autoencoder"], run.data.context // own_k * parent_k
  raise errors.CalmError(
    f"config.model.patch_size is {own_k}, but {name} has K = {parent_k} tokens a patch: give "
    f"another {flag}, or --config.model.patch_size={parent_k} --config.data.context={context}, "
    "which keeps the number of patches an example"
  )


def _flops(run: Run, parents: spec.ParentRuns, vocab_size: int) -> dict[str, float]:
  sizes, patches = parents["autoencoder"].model, run.data.context // run.model.patch_size
  sample = registry.lookup(run.head).train_flops(run.head, run.model.width, sizes.latent)
  return {
    **flops.transformer_parts(run.model, patches),
    "input": 3 * flops.input_per_patch(run.model, sizes),
    "head": 3 * run.loss.samples * sample,
    "frozen encoder": flops.encoder_per_patch(sizes),
  } | _token_flops(run, sizes, vocab_size)


def _token_flops(run: Run, sizes: config.Autoencoder, vocab_size: int) -> dict[str, float]:
  """Returns the token loss's training FLOPs per position; its table is frozen."""
  if run.loss.token_weight == 0:
    return {}
  maps = flops.token_maps_per_patch(run.model, sizes)
  product = flops.vocabulary_per_patch(sizes, vocab_size)
  return {"token loss": (3 * maps + 2 * product) / run.loss.token_every}


def _program_flops(run: Run, parents: spec.ParentRuns, vocab_size: int) -> float:
  sizes, patches = parents["autoencoder"].model, run.data.context // run.model.patch_size
  backbone = flops.computed_transformer(run.model, patches)
  backbone += 3 * flops.input_per_patch(run.model, sizes)
  head = registry.lookup(run.head).computed_flops(
    run.head, run.model.width, sizes.latent, run.loss.samples
  )
  tokens = sum(_token_flops(run, sizes, vocab_size).values())
  return backbone + head + flops.encoder_per_patch(sizes) + tokens


def _unshaped(run: Run) -> frozenset[str]:
  shaping = registry.lookup(run.head).shaping
  free = (field.name for field in dataclasses.fields(run.head) if field.name not in shaping)
  return frozenset({"model.init", *(f"head.{name}" for name in free)})


def _pictures():
  from calm_jax.reporting import calm_pictures, temperature_pictures, training_pictures

  return (
    *calm_pictures.PICTURES,
    *temperature_pictures.PICTURES,
    *training_pictures.PICTURES,
  )


_ENERGY_UNIT = "latent unit^alpha"

_TOKEN_FIGURE = Figure(
  "token_cross_entropy", "Cross-entropy of the next patch's tokens", "nats a token", LOWER
)

_FIGURES = (
  *transformer.BRIER,
  Figure(
    "conditioning_gap",
    "Conditioning gap",
    _ENERGY_UNIT,
    f"{HIGHER}; 0 ignores the context",
    console="value",
  ),
  Figure("energy", "Energy score", _ENERGY_UNIT, LOWER, console="value"),
  _TOKEN_FIGURE,
  *transformer.BRIER_PARTS,
)


def _metrics(run: Run) -> tuple[Figure, ...]:
  return registry.lookup(run.head).figures + (_TOKEN_FIGURE,) * (run.loss.token_weight > 0)


def _loss_unit(run: Run) -> str:
  unit, weight = registry.lookup(run.head).loss_unit, run.loss.token_weight
  return f"{unit} + {weight:g} nats a token" if weight > 0 else unit


SPEC = spec.Spec(
  run=Run,
  title="a CALM language model",
  parents={"autoencoder": "autoencoder"},
  patch_size=lambda run: run.model.patch_size,
  model=_model,
  stage=_stage,
  check=_check,
  flops=_flops,
  program_flops=_program_flops,
  transformer=lambda run: run.model,
  unshaped=_unshaped,
  continued=lambda model, params: model.fitted(params),
  samples="loss.samples",
  writing=writing.Writing(laws.CalmLaw, cost.calm_parts, tradeoff.of_calm, takes_candidates=True),
  presentation=presentation.Presentation(
    heading="Stage 2: language model",
    title="CALM language model",
    settings=(
      *transformer.SETTINGS,
      "model.input",
      "head.kind",
      "head.blocks",
      "head.noise",
      "head.steps",
      "loss.alpha",
      "loss.samples",
      "loss.targets",
      "loss.posterior_draws",
      "loss.token_weight",
      "loss.token_every",
    ),
    metrics=_metrics,
    figures=_FIGURES,
    loss_unit=_loss_unit,
    pictures=_pictures,
    facts=lambda run, parents: [
      ("K, tokens a patch", parents["autoencoder"].model.patch_size),
      ("latent", parents["autoencoder"].model.latent),
    ],
    summary={
      name: name
      for name in (
        *(f"brier_{n}" for n in range(1, brier.ORDERS + 1)),
        "brier_lm",
        "brier_lm_stderr",
        "brier_lm_marginal",
        "conditioning_gap",
        "conditioning_gap_stderr",
        "context_tokens",
      )
    },
  ),
  writers={
    "reference": to_reference.write_calm,
    "torch": to_torch.write_calm,
    "stablehlo": to_stablehlo.write_calm,
    "onnx": to_onnx.write_calm,
  },
)
