"""The baseline: tokens -> logits of the next token."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax import config
from calm_jax.figures import HIGHER, LOWER, Figure
from calm_jax.generation import cost, laws, tradeoff, writing
from calm_jax.interchange import to_llama
from calm_jax.kernels import cross_entropy
from calm_jax.models import flops, layers, memory, transformer
from calm_jax.objectives import brier
from calm_jax.parallel import mesh
from calm_jax.reporting import presentation
from calm_jax.stages import spec
from calm_jax.training import stage

# Positions whose logits [V] are in memory at once in evaluation.
LAW_CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class Run(config.Run):
  """The baseline: a Llama that predicts the next token by cross-entropy."""

  stage: Literal["transformer"] = "transformer"
  data: config.Data = dataclasses.field(default_factory=lambda: config.Data(context=2048))
  training: config.Training = dataclasses.field(default_factory=lambda: config.Training(batch=1024))
  model: config.Transformer = dataclasses.field(default_factory=config.Transformer)


class _Distribution(NamedTuple):
  """Figures of next-token distributions that evaluation needs, [...] each.

  Attributes:
    log_target: log probability of the text's token, nats.
    square: Σ p², the probability that two draws are equal.
    draw: a token drawn from the distribution.
    draw_probability: probability of `draw`.
  """

  log_target: jax.Array
  square: jax.Array
  draw: jax.Array
  draw_probability: jax.Array


def _distribution(log_p_V: jax.Array, target: jax.Array, key: jax.Array) -> _Distribution:
  """Returns the figures of one distribution, from its log probabilities."""
  draw = jax.random.categorical(key, log_p_V)
  square = jnp.sum(jnp.exp(2 * log_p_V))
  return _Distribution(log_p_V[target], square, draw.astype(jnp.int32), jnp.exp(log_p_V[draw]))


@dataclasses.dataclass(frozen=True)
class _Functions:
  """The baseline's functions for the training loop."""

  model: transformer.Transformer

  def _hidden(self, params, token_BS, cache=None):
    return layers.apply(self.model, params, token_BS, cache, method="hidden")

  def loss(self, params, frozen, batch, key):
    """Returns the cross-entropy, nats per token, and metrics."""
    token_BS = batch["tokens"]
    hidden_BSD, _ = self._hidden(params, mesh.constrain(token_BS, "batch", "position"))
    target_BS = stage.next_position(token_BS)
    table_VD = params["out"]["kernel"].T
    mask_BS = stage.has_next(target_BS)
    scores = cross_entropy.scores(table_VD, hidden_BSD, target_BS, mask_BS / mask_BS.sum())
    metrics = {
      "tokens": jnp.float32(token_BS[:, 1:].size),
      "patches_per_token": jnp.float32(1),
    }
    return scores.loss, metrics

  def _distributions(self, params, hidden_BSD, target_BS, key_B) -> _Distribution:
    """Returns the next-token distribution of each position, a chunk of positions at a time."""
    key_BS = jax.vmap(lambda key: jax.random.split(key, target_BS.shape[1]))(key_B)

    def chunk_distributions(positions):
      hidden_SD, target_S, key_S = positions
      logits_SV = layers.apply(self.model, params, hidden_SD, method="logits")
      log_p_SV = mesh.constrain(jax.nn.log_softmax(logits_SV), "position", "width")
      return jax.vmap(_distribution)(log_p_SV, target_S, key_S)

    chunk = max(1, LAW_CHUNK // mesh.own_examples(len(key_B)))

    def example_distributions(*example):
      return layers.in_chunks(chunk_distributions, example, chunk)

    return mesh.map_examples(example_distributions)(hidden_BSD, target_BS, key_BS)

  def evaluate(self, params, frozen, batch, key):
    """Returns scores of each example: BrierLM's terms and the cross-entropy."""
    token_BS, key_B = batch["tokens"], stage.example_keys(key, batch["index"])
    count = token_BS.shape[1] - 1
    hidden_BSD, cache = self._hidden(params, token_BS[:, :-1], memory.Cache.empty(count))
    distribution = self._distributions(params, hidden_BSD, token_BS[:, 1:], key_B)
    starts = count - brier.ORDERS + 1
    p_target_BS = jnp.exp(distribution.log_target)
    accuracies = [p_target_BS[:, n : n + starts, None] for n in range(brier.ORDERS)]
    accuracy_BSn = brier.chain(accuracies, [share_BS1[..., 0] for share_BS1 in accuracies[:-1]])
    start_distribution = jax.tree.map(lambda x: x[:, :starts], distribution)
    terms = self._collisions(params, memory.Branches.of(cache, starts), start_distribution, key_B)
    return {
      "accuracy": jnp.mean(accuracy_BSn, axis=1),
      "collision": jnp.mean(brier.chain(*terms), axis=1),
      "cross_entropy": jnp.mean(-distribution.log_target, axis=1),
    }

  def _collisions(self, params, branches: memory.Branches, distribution: _Distribution, key_B):
    """Returns (within, whole) for `brier.chain`, along one drawn path from each start."""
    within, whole = [distribution.square[..., None]], []
    for n in range(1, brier.ORDERS):
      whole.append(distribution.draw_probability)
      hidden_BSD, branches = self._hidden(params, distribution.draw, branches)
      key_B = stage.purpose_keys(key_B, n)
      distribution = self._distributions(params, hidden_BSD, distribution.draw, key_B)
      within.append(distribution.square[..., None])
    return within, whole

  def summarize(self, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the figures from the scores of all examples."""
    result = brier.summary(scores["accuracy"], scores["collision"])
    return result | stage.with_stderr(scores, "cross_entropy")


def _stage(run: Run, model: transformer.Transformer, parents: spec.Parents) -> stage.Stage:
  functions = _Functions(model)
  return stage.Stage(model.initial, functions.loss, functions.evaluate, functions.summarize)


def _model(run: Run, parents: spec.Parents, vocab_size: int, dtype: Any) -> transformer.Transformer:
  return transformer.Transformer(run.model, vocab_size, jnp.dtype(dtype), run.execution)


def _flops(run: Run, parents: spec.ParentRuns, vocab_size: int) -> dict[str, float]:
  return {
    **flops.transformer_parts(run.model, run.data.context),
    "vocabulary": 3 * 2 * run.model.width * vocab_size,
  }


def _program_flops(run: Run, parents: spec.ParentRuns, vocab_size: int) -> float:
  layers_flops = flops.computed_transformer(run.model, run.data.context)
  return layers_flops + 3 * 2 * run.model.width * vocab_size


def _pictures():
  from calm_jax.reporting import brier_pictures, temperature_pictures, training_pictures

  return (
    *brier_pictures.PICTURES,
    *temperature_pictures.PICTURES,
    *training_pictures.PICTURES,
  )


# Figures of every language model, and settings of every Transformer.
BRIER = (
  Figure("brier_lm", "BrierLM", "%", HIGHER, console="value and error"),
  Figure("brier_lm_marginal", "BrierLM of the marginal", "%", "reached without any context"),
)
BRIER_PARTS = tuple(
  figure
  for n in range(1, brier.ORDERS + 1)
  for figure in (
    Figure(f"brier_{n}", f"Brier-{n}", "%", HIGHER),
    Figure(f"accuracy_{n}", f"Accuracy, n = {n}", "%", HIGHER),
    Figure(f"collision_{n}", f"Collision, n = {n}", "%", "equals accuracy if calibrated"),
  )
)
SETTINGS = (
  "model.layers",
  "model.width",
  "model.ffn",
  "model.heads",
  "model.kv_heads",
  "model.rope_theta",
  "model.init",
)

SPEC = spec.Spec(
  run=Run,
  title="a Transformer baseline",
  patch_size=lambda run: 1,
  model=_model,
  stage=_stage,
  flops=_flops,
  program_flops=_program_flops,
  transformer=lambda run: run.model,
  unshaped=lambda run: frozenset({"model.init"}),
  writing=writing.Writing(
    laws.TransformerLaw, cost.transformer_parts, tradeoff.of_transformer, takes_candidates=False
  ),
  presentation=presentation.Presentation(
    heading="Baseline: Transformer",
    title="Transformer baseline of CALM",
    settings=SETTINGS,
    metrics=lambda run: (),
    figures=(*BRIER, Figure("cross_entropy", "Cross-entropy", "nats a token", LOWER), *BRIER_PARTS),
    loss_unit=lambda run: "nats a token",
    pictures=_pictures,
  ),
  writers={"reference": to_llama.write, "llama": to_llama.write},
)
