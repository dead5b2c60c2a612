"""A tempered head: hidden, 1/T -> one draw, trained on winners of races between draws at T = 1."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax import config
from calm_jax.figures import HIGHER, LOWER, Figure
from calm_jax.generation import (
  candidates,
  choosers,
  cost,
  laws,
  requests,
  rules,
  temperature,
  tradeoff,
  writing,
)
from calm_jax.interchange import to_onnx, to_stablehlo, to_torch
from calm_jax.models import flops, layers
from calm_jax.models.heads import head, registry, tempered
from calm_jax.objectives import brier
from calm_jax.parallel import mesh
from calm_jax.reporting import presentation
from calm_jax.stages import calm, spec, transformer
from calm_jax.training import stage

Params = Any

# Temperatures at which one draw is compared with the race in evaluation.
EVALUATED = (0.7, 0.5, 0.333)
# Purposes of an example's key; the parent's are below.
_POSITIONS, _DRAWS, _RACES, _LOSS, _EVALUATION, _BRIER = range(16, 22)


@dataclasses.dataclass(frozen=True)
class Loss:
  """Objective: the head's own loss, with the winners of races as targets.

  Attributes:
    samples: N, samples per patch and temperature.
    alpha: exponent of the energy score's distance, in (0, 2]; see `config.CalmLoss`.
    brier: weight of the prefixes' Brier score, of draws of their own at one race per position; 0
      leaves it out. Heads that take several steps per sample are trained through all of them.
    sharpening: c in [0, 1). The collision weighs 1 − c (1 − T²) in that score. With 0 the score is
      proper; the higher c is, the fewer draws are outliers.
    every: one position in this many is trained; the races cost more than the rest.
    races: temperatures per position; each is drawn log-uniformly in (least_temperature, 1] and
      has a race of its own between the same draws, in another order.
    least_temperature: the lowest temperature that one draw reaches.
    num_candidates: draws at T = 1 per position.
    rule, at_limit: the race; see `generation.rules` and `generation.choosers`.
  """

  samples: int = 8
  alpha: float = 1.0
  brier: float = 10.0
  sharpening: float = 0.17
  every: int = 16
  races: int = 4
  least_temperature: float = 0.25
  num_candidates: int = 24
  rule: str = "first"
  at_limit: str = "prefix"

  def __post_init__(self):
    _ = self.of_head  # Checks its settings.
    config.require_positive(self, "races", "num_candidates", most=config.MOST_DRAWS)
    config.require_positive(self, "every")
    config.require(
      0 < self.least_temperature < 1,
      f"least_temperature must lie in (0, 1), got {self.least_temperature}",
    )
    config.require_not_negative(self, "brier")
    config.require(
      0 <= self.sharpening < 1, f"sharpening must lie in [0, 1), got {self.sharpening}"
    )
    config.require(
      self.num_candidates >= 1 / self.least_temperature,
      f"num_candidates must be at least 1/least_temperature = {1 / self.least_temperature:g}, "
      f"got {self.num_candidates}",
    )
    config.require(
      self.rule != rules.DIRECT and self.at_limit in choosers.CHOOSERS,
      f"the race must compare draws, and choose one at the limit, got {self.rule}:{self.at_limit}",
    )
    requests.Sampler(self.rule, self.at_limit)

  @property
  def of_head(self) -> config.CalmLoss:
    """Settings of the head's loss: one target per patch, a draw of the winner's posterior."""
    return config.CalmLoss(self.samples, posterior_draws=1, alpha=self.alpha)


@dataclasses.dataclass(frozen=True)
class Run(config.Run):
  """A tempered head, beside the head of a trained language model that stays as it is.

  `model` and `head` must have the sizes of that language model.

  Attributes:
    calm: stage two's workdir. Its weights are copied into this run's workdir at the start.
  """

  stage: Literal["tempered"] = "tempered"
  calm: str = ""
  model: config.Backbone = dataclasses.field(default_factory=config.Backbone)
  head: config.Head = dataclasses.field(default_factory=config.Head)
  loss: Loss = dataclasses.field(default_factory=Loss)


@dataclasses.dataclass(frozen=True)
class _Positions:
  """Positions of a batch that are trained or compared.

  Attributes:
    hidden_BpD: the trunk's hidden states.
    next_BpK: patches of the text that they predict.
    key_B: one key per example.
  """

  hidden_BpD: jax.Array
  next_BpK: jax.Array
  key_B: jax.Array


@dataclasses.dataclass(frozen=True)
class _Functions:
  """The stage's functions for the training loop.

  `frozen` are the parent's parameters, {"calm": ..., "autoencoder": ...}.
  """

  run: Run
  model: tempered.Tempered
  calm: calm.Functions

  def _read(self, frozen, batch, key) -> _Positions:
    """Returns one position in `every` of each example, from a random first one."""
    text = self.calm.read(frozen["autoencoder"], batch, key)
    hidden_BPD, _ = self.calm.model.hidden(frozen["calm"], text.token_BPK, text.latent_BPZ)
    predicted = hidden_BPD.shape[1] - 1
    count = _trained(predicted, self.run)

    def strided(hidden_PD, token_PK, key):
      first = jax.random.randint(key, (), 0, self.run.loss.every)
      position_p = jnp.minimum(first + self.run.loss.every * jnp.arange(count), predicted - 1)
      return hidden_PD[position_p], token_PK[position_p + 1]

    keys = stage.purpose_keys(text.key_B, _POSITIONS)
    hidden_BpD, next_BpK = mesh.map_examples(strided)(hidden_BPD, text.token_BPK, keys)
    return _Positions(hidden_BpD, next_BpK, text.key_B)

  def _pools(self, frozen, hidden_BpD, key_B, count: int) -> jax.Array:
    """Returns tokens of `count` (N) draws at T = 1 of every position, [B, p, N, K]."""
    sample_BNpZ = self.calm.draws(frozen["calm"], hidden_BpD, key_B, count)
    return jnp.moveaxis(self.calm.decode(frozen["autoencoder"], sample_BNpZ), 1, 2)

  def _winners(self, pool_BRNK, power_BR, key_B) -> jax.Array:
    """Returns the winner of a race between each row's draws, [B, R, K]."""
    settings = self.run.loss
    rule, chooser = rules.RULES[settings.rule], choosers.CHOOSERS[settings.at_limit]

    def race(pool_RNK, power_R, key):
      rows, slots = pool_RNK.shape[:2]
      key_R = jax.random.split(key, rows)
      choice = candidates.choose_from(pool_RNK, power_R, key_R, rule, chooser, slots)
      return choice.patch.token_K

    return mesh.map_examples(race)(pool_BRNK, power_BR, key_B)

  def _races(self, pool_BpNK, key_B) -> tuple[jax.Array, jax.Array]:
    """Returns powers s and winners of `races` races per position, [B, R] and [B, R, K]."""
    races, most = self.run.loss.races, 1 / self.run.loss.least_temperature

    def start(pool_pNK, key):
      """Returns each race's power and its draws, in an order of their own."""
      power_key, order_key = jax.random.split(key)
      pool_RNK = jnp.repeat(pool_pNK, races, axis=0)
      rows = len(pool_RNK)
      power_R = jnp.exp(jax.random.uniform(power_key, (rows,)) * math.log(most))
      order = jax.vmap(lambda key, pool_NK: jax.random.permutation(key, pool_NK))
      return power_R, order(jax.random.split(order_key, rows), pool_RNK)

    keys = stage.purpose_keys(key_B, _RACES)
    power_BR, pool_BRNK = mesh.map_examples(start)(pool_BpNK, keys)
    return power_BR, self._winners(pool_BRNK, power_BR, stage.purpose_keys(keys, 1))

  def loss(self, params, frozen, batch, key):
    """Returns the head's loss against the winners, averaged over all races, and metrics."""
    positions = self._read(frozen, batch, key)
    hidden_BpD, key_B = positions.hidden_BpD, positions.key_B
    keys = stage.purpose_keys(key_B, _DRAWS)
    pool_BpNK = self._pools(frozen, hidden_BpD, keys, self.run.loss.num_candidates)
    power_BR, winner_BRK = self._races(pool_BpNK, key_B)
    posterior_BRZ = self.calm.encode(frozen["autoencoder"], winner_BRK)
    hidden_BRD = jnp.repeat(hidden_BpD, self.run.loss.races, axis=1)

    def head_loss(hidden_RD, power_R, mean_RZ, log_std_RZ, key):
      posterior, settings = (mean_RZ, log_std_RZ), self.run.loss.of_head
      return self.model.loss(params, hidden_RD, power_R, posterior, key, settings)

    constants = jax.lax.stop_gradient((hidden_BRD, power_BR, *posterior_BRZ))
    loss_BR, figures = mesh.map_examples(head_loss)(*constants, stage.purpose_keys(key_B, _LOSS))
    loss = jnp.mean(loss_BR)
    if self.run.loss.brier > 0:
      loss_Bp, own_figures = self._brier(params, frozen, positions, pool_BpNK, power_BR, winner_BRK)
      loss += self.run.loss.brier * jnp.mean(loss_Bp)
      figures |= own_figures
    metrics = {
      "tokens": jnp.float32(batch["tokens"].size),
      "patches_per_token": jnp.float32(1 / self.run.model.patch_size),
    }
    return loss, metrics | jax.tree.map(jnp.mean, figures)

  def _brier(
    self, params, frozen, positions, pool_BpNK, power_BR, winner_BRK
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns minus the prefixes' Brier score against each position's first winner, and figures.

    Both are [B, p]. The tokens of all draws of an example are the candidates of its patches.
    """
    settings = self.run.loss
    power_Bp, winner_BpK = (x[:, :: settings.races] for x in (power_BR, winner_BRK))

    def score(hidden_pD, power_p, winner_pK, pool_pNK, key):
      sample_NpZ = self.model.sample(params, hidden_pD, power_p, key, settings.samples)
      candidate_KU = pool_pNK.reshape(-1, pool_pNK.shape[-1]).T
      decode = (self.calm.autoencoder, frozen["autoencoder"], sample_NpZ, candidate_KU)
      logit_NpKU = layers.apply(*decode, method="decode_among")
      accuracy_pK, collision_pK = brier.expected(logit_NpKU, candidate_KU, winner_pK)
      weight_p1 = 1 - settings.sharpening * (1 - power_p[:, None] ** -2)
      loss_p = jnp.mean(weight_p1 * collision_pK - 2 * accuracy_pK, axis=-1)
      return loss_p, jnp.mean(2 * accuracy_pK - collision_pK, axis=-1)

    constants = (positions.hidden_BpD, power_Bp, winner_BpK, pool_BpNK)
    keys = stage.purpose_keys(positions.key_B, _BRIER)
    loss_Bp, brier_Bp = mesh.map_examples(score)(*jax.lax.stop_gradient(constants), keys)
    return loss_Bp, {"prefix_brier": 100 * brier_Bp}

  def evaluate(self, params, frozen, batch, key):
    """Returns scores of each example: one draw against two races, per temperature, [B, n] each."""
    positions = self._read(frozen, batch, key)
    key_B = stage.purpose_keys(positions.key_B, _EVALUATION)
    number = 2 * self.run.loss.num_candidates
    keys = stage.purpose_keys(key_B, 0)
    pool_BpNK = self._pools(frozen, positions.hidden_BpD, keys, number)
    values = evaluated(self.run)

    def compared(job: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
      index, power = job
      keys = stage.purpose_keys(key_B, index)
      drawn_BNpK = self._drawn(params, frozen, positions.hidden_BpD, power, keys)
      raced_B2pK = self._raced(pool_BpNK, power, keys)
      figures = mesh.map_examples(_compared)(drawn_BNpK, raced_B2pK, positions.next_BpK)
      return {name: jnp.mean(score_Bpn, axis=1) for name, score_Bpn in figures.items()}

    powers = jnp.array([temperature.power(value) for value in values], jnp.float32)
    # Compiled once for all temperatures.
    figures = jax.lax.map(compared, (1 + jnp.arange(len(values)), powers))
    return {
      _name(name, value): score_TBn[i]
      for name, score_TBn in figures.items()
      for i, value in enumerate(values)
    }

  def _drawn(self, params, frozen, hidden_BpD, power: jax.Array, key_B) -> jax.Array:
    """Returns tokens of N single draws at a power s, [B, N, p, K]."""

    def draw(hidden_pD, key):
      power_p = jnp.full(len(hidden_pD), power)
      return self.model.sample(params, hidden_pD, power_p, key, self.run.loss.samples)

    sample_BNpZ = mesh.map_examples(draw)(hidden_BpD, stage.purpose_keys(key_B, 0))
    return self.calm.decode(frozen["autoencoder"], sample_BNpZ)

  def _raced(self, pool_BpNK, power: jax.Array, key_B) -> jax.Array:
    """Returns winners of two races, between either half of each position's draws, [B, 2, p, K]."""
    half = pool_BpNK.shape[2] // 2
    power_Bp = jnp.full(pool_BpNK.shape[:2], power)
    winners = [
      self._winners(
        pool_BpNK[:, :, i * half : (i + 1) * half], power_Bp, stage.purpose_keys(key_B, 1 + i)
      )
      for i in range(2)
    ]
    return jnp.stack(winners, axis=1)

  def summarize(self, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns each score's mean over examples and over n, in percent, with its standard error."""
    return stage.with_stderr({name: 100 * x.mean(axis=-1) for name, x in scores.items()}, *scores)


def _trained(predicted: int, run: Run) -> int:
  """Returns how many of an example's predicted positions are trained."""
  return -(-predicted // run.loss.every)


def evaluated(run: Run) -> tuple[float, ...]:
  """Returns the temperatures of EVALUATED that one draw of a run's head reaches."""
  return tuple(x for x in EVALUATED if x >= run.loss.least_temperature)


def _name(figure: str, value: float) -> str:
  return f"{figure}_at_{value:g}"


def _compared(drawn_NpK, raced_2pK, next_pK) -> dict[str, jax.Array]:
  """Returns figures of single draws and of races, for their first n tokens, [p, n] each.

  n is 1 to K, at most `brier.ORDERS`.
  """
  drawn_pn, raced_pn = brier.collision(drawn_NpK), brier.collision(raced_2pK)
  cross_pn = jnp.mean(jnp.stack([brier.accuracy(drawn_NpK, raced_pK) for raced_pK in raced_2pK]), 0)
  accuracy_pn = brier.accuracy(drawn_NpK, next_pK)
  figures = {
    "accuracy": accuracy_pn,
    "accuracy_gap": accuracy_pn - brier.accuracy(raced_2pK, next_pK),
    "collision": drawn_pn,
    "collision_gap": drawn_pn - raced_pn,
    "distance": drawn_pn - 2 * cross_pn + raced_pn,
  }
  return {name: figure_pn[:, : brier.ORDERS] for name, figure_pn in figures.items()}


def _stage(run: Run, model: tempered.Tempered, parents: spec.Parents) -> stage.Stage:
  parent = parents["calm"]
  autoencoder = parent.parents["autoencoder"]
  functions = _Functions(run, model, calm.Functions(parent.run, parent.model, autoencoder.model))
  frozen = {"calm": parent.params, "autoencoder": autoencoder.params}
  return stage.Stage(model.initial, functions.loss, functions.evaluate, functions.summarize, frozen)


def _model(run: Run, parents: spec.Parents, vocab_size: int, dtype: Any) -> tempered.Tempered:
  latent = parents["calm"].model.sizes.latent
  sizes, kind = run.model, jnp.dtype(dtype)
  trunk = head.Trunk(sizes.width, latent, sizes.init, kind, run.execution.remat)
  return tempered.Tempered(registry.build(run.head, trunk), trunk)


def _initial(run: Run, model: tempered.Tempered, parents: spec.Parents) -> Params:
  """Returns a copy of the parent's head, whose draws are the same at every temperature."""
  key = jax.random.key(run.training.seed)
  return {
    "head": jax.tree.map(jnp.copy, parents["calm"].params["head"]),
    "power": jax.device_get(model.initial_embedding(key)),
  }


def _check(run: Run, parents: spec.ParentRuns, vocab_size: int, labels: spec.ParentLabels) -> None:
  """Raises CalmError unless the sizes are those of the language model."""
  flags, unshaped = [], calm.SPEC.unshaped(run)
  for group in ("model", "head"):
    own, theirs = (dataclasses.asdict(getattr(x, group)) for x in (run, parents["calm"]))
    flags += [
      f"--config.{group}.{name}={value}"
      for name, value in theirs.items()
      if own[name] != value and f"{group}.{name}" not in unshaped
    ]
  config.require(
    not flags, f"{labels['calm'][0]} has other sizes than the settings: give {' '.join(flags)}"
  )


def _flops(run: Run, parents: spec.ParentRuns, vocab_size: int) -> dict[str, float]:
  sample = registry.lookup(run.head).train_flops(
    run.head, run.model.width, parents["autoencoder"].model.latent
  )
  return _parts(run, parents, vocab_size, 3 * run.loss.samples * sample)


def _program_flops(run: Run, parents: spec.ParentRuns, vocab_size: int) -> float:
  computed = registry.lookup(run.head).computed_flops(
    run.head, run.model.width, parents["autoencoder"].model.latent, run.loss.samples
  )
  return sum(_parts(run, parents, vocab_size, computed).values())


def _parts(
  run: Run, parents: spec.ParentRuns, vocab_size: int, head_flops: float
) -> dict[str, float]:
  """Returns training FLOPs per patch of the text; one patch in `every` is trained.

  Args:
    head_flops: training FLOPs of the head for one patch at one temperature.
  """
  sizes, settings = parents["autoencoder"].model, run.loss
  patches = run.data.context // run.model.patch_size
  once, sample = flops.head_parts(run.head, run.model.width, sizes.latent)
  draws = once + settings.num_candidates * sample
  decoded = settings.num_candidates * flops.decoder_per_patch(sizes, vocab_size)
  winners = settings.races * flops.encoder_per_patch(sizes)
  head_flops += 3 * tempered.embedding_flops(run.model.width)
  parts = {
    "draws": draws,
    "decoder": decoded,
    "encoder": winners,
    "tempered head": settings.races * head_flops,
  }
  if settings.brier > 0:
    number = _trained(patches - 1, run) * settings.num_candidates
    parts["Brier score"] = 3 * (once + settings.samples * sample)
    parts["Brier score"] += _score_flops(settings, sizes, number)
  return {
    "frozen backbone": flops.transformer_per_position(run.model, patches),
    "frozen input": flops.input_per_patch(run.model, sizes),
  } | {name: part / settings.every for name, part in parts.items()}


def _score_flops(settings: Loss, sizes: config.Autoencoder, candidates: int) -> float:
  """Returns FLOPs of scoring one patch's draws; the decoder's weights get no gradient."""
  count, tokens = settings.samples, sizes.patch_size * candidates
  decoded = flops.decoder_per_patch(sizes, candidates)
  return 2 * count * decoded + 3 * 2 * count**2 * tokens


def _figures() -> tuple[Figure, ...]:
  shown = (
    ("accuracy", "Accuracy of one draw", HIGHER),
    ("accuracy_gap", "Accuracy of one draw minus the race's", "0 if both follow one law"),
    ("collision", "Collision of two draws", "lower is more diverse"),
    ("collision_gap", "Collision of two draws minus the races'", "0 if both follow one law"),
    ("distance", "Distance from the race's law", f"{LOWER}; 0 for equal laws"),
  )
  return tuple(
    Figure(
      _name(name, value),
      f"{label}, T = {value:g}",
      "%",
      meaning,
      console="value and error" if name in ("accuracy_gap", "distance") else "",
    )
    for value in EVALUATED
    for name, label, meaning in shown
  )


def _metrics(run: Run) -> tuple[Figure, ...]:
  """Returns what the loss reports."""
  own = Figure("prefix_brier", "Brier score of prefixes, on winners", "%", HIGHER, console="value")
  return (*registry.lookup(run.head).figures, *[own] * (run.loss.brier > 0))


def _loss_unit(run: Run) -> str:
  unit = registry.lookup(run.head).loss_unit
  return f"{unit} - {run.loss.brier:g} Brier" if run.loss.brier > 0 else unit


def _pictures():
  from calm_jax.reporting import temperature_pictures, training_pictures

  return (*temperature_pictures.PICTURES, *training_pictures.PICTURES)


SPEC = spec.Spec(
  run=Run,
  title="a tempered head",
  parents={"calm": "calm"},
  patch_size=lambda run: run.model.patch_size,
  model=_model,
  initial=_initial,
  stage=_stage,
  check=_check,
  flops=_flops,
  program_flops=_program_flops,
  transformer=lambda run: run.model,
  unshaped=calm.SPEC.unshaped,
  samples="loss.samples",
  writing=writing.Writing(
    laws.TemperedLaw,
    cost.calm_parts,
    tradeoff.of_tempered,
    takes_candidates=True,
    rule=rules.DIRECT,
  ),
  presentation=presentation.Presentation(
    heading="Tempered head",
    title="CALM language model with a tempered head",
    settings=(
      *transformer.SETTINGS,
      "model.input",
      "head.kind",
      "head.blocks",
      "head.noise",
      "loss.alpha",
      "loss.brier",
      "loss.sharpening",
      "loss.samples",
      "loss.every",
      "loss.races",
      "loss.least_temperature",
      "loss.num_candidates",
      "loss.rule",
      "loss.at_limit",
    ),
    metrics=_metrics,
    figures=_figures(),
    loss_unit=_loss_unit,
    pictures=_pictures,
    facts=lambda run, parents: [
      ("K, tokens a patch", run.model.patch_size),
      ("latent", parents["autoencoder"].model.latent),
    ],
  ),
  writers={
    "torch": to_torch.write_tempered,
    "stablehlo": to_stablehlo.write_tempered,
    "onnx": to_onnx.write_tempered,
  },
)
