"""Settings -> FLOPs and memory traffic of generation, by part of the model.

FLOPs are those of matrix products, two per multiply-add, as in `models/flops.py`. Bytes are the
memory traffic of a step that generates a patch for every text of a batch: weights are read once
per step, those that draws use once per round of draws; the cache is read once; the logits of the
draws are written and read, because no kernel fuses them with the argmax.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from calm_jax import config
from calm_jax.models import flops
from calm_jax.models.heads import tempered


@dataclasses.dataclass(frozen=True)
class WritingJob:
  """The generation whose cost is counted.

  Attributes:
    run, parents: settings of a stage that generates text and of its parents.
    vocab_size: V.
    positions: patches in the window. On average half of it is filled, unless `full`.
    draws: draws per patch.
    rounds: rounds in which the draws of a patch are made.
    batch: texts generated at once.
    full: count attention to a full window, as the paper does.
    weight_bytes: bytes per weight and per element of the cache.
    is_direct: whether a tempered head makes the draws.
  """

  run: Any
  parents: Mapping[str, Any]
  vocab_size: int
  positions: int
  draws: float = 1.0
  rounds: float = 1.0
  batch: int = 1
  full: bool = False
  weight_bytes: int = 2
  is_direct: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
  """Cost of one part of the model: FLOPs and bytes per patch (CALM) or token of one text."""

  name: str
  flops: float
  bytes: float


def backbone(job: WritingJob, sizes: config.Transformer) -> list[Part]:
  """Returns the costs of a Transformer per position: projections, and attention to the cache."""
  slots = job.positions if job.full else job.positions / 2
  projections = flops.transformer_per_position(sizes, 0)
  attention = sizes.layers * 2 * 2 * sizes.width * slots
  cached = sizes.layers * 2 * slots * sizes.width * sizes.kv_heads // sizes.heads
  weights = projections / 2  # A weight is a multiply-add.
  return [
    Part("backbone", projections, weights * job.weight_bytes / job.batch),
    Part("attention", attention, cached * job.weight_bytes),
  ]


def vocabulary(job: WritingJob, width: int, tokens: float, rounds: float) -> Part:
  """Returns the cost of the logits of `tokens` tokens; each round reads the table [D, V]."""
  table = width * job.vocab_size
  logits = 2 * 4 * tokens * job.vocab_size
  return Part(
    "vocabulary", 2 * tokens * table, rounds * table * job.weight_bytes / job.batch + logits
  )


def transformer_parts(job: WritingJob) -> list[Part]:
  """Returns the costs of generating a token with the baseline."""
  sizes = job.run.model
  return [*backbone(job, sizes), vocabulary(job, sizes.width, 1, 1)]


def calm_parts(job: WritingJob) -> list[Part]:
  """Returns the costs of generating a patch with CALM."""
  run, sizes = job.run, job.parents["autoencoder"].model
  entry = flops.input_per_patch(run.model, sizes)
  shared, sample = flops.head_parts(run.head, run.model.width, sizes.latent)
  if job.full:  # The paper's count repeats for each sample what all samples share.
    shared, sample = 0.0, shared + sample
  decoder = flops.decoder_per_patch(sizes, 0)
  weights = job.weight_bytes / job.batch

  def draws_part(name: str, flops_per_draw: float, num_weights: float) -> Part:
    return Part(name, job.draws * flops_per_draw, job.rounds * num_weights * weights)

  power = tempered.embedding_flops(run.model.width) if job.is_direct else 0
  return [
    *backbone(job, run.model),
    Part("input", entry, entry / 2 * weights),
    Part("head, once", shared + power, (shared + power) / 2 * weights),
    draws_part("head, draws", sample, sample / 2),
    draws_part("decoder", decoder, flops.decoder_weights(sizes)),
    vocabulary(job, sizes.width, job.draws * sizes.patch_size, job.rounds),
  ]
