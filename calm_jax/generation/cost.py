"""Settings -> FLOPs and bytes of writing a token, part by part.

FLOPs are those of matrix products, a multiply-add two, as in `models/flops.py`. Bytes
are what must cross the memory's bus in a step that writes a patch for every text of a
batch: weights once a step, and those that candidates use once a round of draws; the cache
once; logits of the candidates written and read, as no kernel fuses them with the argmax.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from calm_jax import config
from calm_jax.models import flops


@dataclasses.dataclass(frozen=True)
class WritingJob:
  """What is written, and how.

  Attributes:
    run, parents: settings of a stage that writes text and of its parents.
    positions: patches in the window. The mean text fills half of it, unless `full`.
    draws: candidates a patch. rounds: in which they are drawn.
    batch: texts written at once.
    full: count attention to a full window, as the paper does.
    weight_bytes: of a weight, and of an element of the cache.
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


@dataclasses.dataclass(frozen=True)
class Part:
  """One part of a step: FLOPs and bytes a patch, or a token, of one text."""

  name: str
  flops: float
  bytes: float


def backbone(job: WritingJob, sizes: config.Transformer) -> list[Part]:
  """Returns the parts of a Transformer that reads a patch."""
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
  """Returns the part of the logits of `tokens` tokens, and of what reads them."""
  table = width * job.vocab_size
  logits = 2 * 4 * tokens * job.vocab_size
  return Part(
    "vocabulary", 2 * tokens * table, rounds * table * job.weight_bytes / job.batch + logits
  )


def transformer_parts(job: WritingJob) -> list[Part]:
  """Returns the parts of writing a token with the baseline."""
  sizes = job.run.model
  return [*backbone(job, sizes), vocabulary(job, sizes.width, 1, 1)]


def calm_parts(job: WritingJob) -> list[Part]:
  """Returns the parts of writing a patch with CALM."""
  run, sizes = job.run, job.parents["autoencoder"].model
  entry = flops.input_per_patch(run.model, sizes)
  shared, sample = flops.head_parts(run.head, run.model.width, sizes.latent)
  if job.full:  # The paper's count repeats for each sample what all samples share.
    shared, sample = 0.0, shared + sample
  decoder = flops.decoder_per_patch(sizes, 0)
  weights = job.weight_bytes / job.batch

  def drawn(name: str, flops_a_draw: float, weight_count: float) -> Part:
    return Part(name, job.draws * flops_a_draw, job.rounds * weight_count * weights)

  return [
    *backbone(job, run.model),
    Part("input", entry, entry / 2 * weights),
    Part("head, once", shared, shared / 2 * weights),
    drawn("head, draws", sample, sample / 2),
    drawn("decoder", decoder, flops.decoder_weights(sizes)),
    vocabulary(job, sizes.width, job.draws * sizes.patch_size, job.rounds),
  ]
