"""Settings -> FLOPs and bytes of writing a token, part by part, and what bounds it on a chip.

FLOPs are those of matrix products, a multiply-add two, as in `models/flops.py`. Bytes
are what must cross the memory's bus in a step that writes a patch for every text of a
batch: weights once a step, those that candidates take once a round of draws; the cache
once; logits of the candidates written and read, as no kernel fuses them with the argmax.
"""

import dataclasses

from calm_jax import config
from calm_jax.models import flops
from calm_jax.planning import topologies


@dataclasses.dataclass(frozen=True)
class Job:
  """What is written, and how.

  Attributes:
    run: of a stage that writes text. codec: sizes of its autoencoder, None for the baseline.
    positions: patches in the window. The mean text fills half of it, unless `full`.
    draws: candidates a patch. rounds: in which they are drawn.
    batch: texts written at once.
    full: count attention to a full window, as the paper does.
    weight_bytes: of a weight, and of an element of the cache.
  """

  run: config.CalmRun | config.TransformerRun
  codec: config.Autoencoder | None
  vocab_size: int
  positions: int
  draws: float = 1.0
  rounds: float = 1.0
  batch: int = 1
  full: bool = False
  weight_bytes: int = 2

  @property
  def patch_size(self) -> int:
    return self.codec.patch_size if self.codec else 1


@dataclasses.dataclass(frozen=True)
class Part:
  """One part of a step, a token of one text."""

  name: str
  flops: float
  bytes: float


def _backbone(job: Job) -> list[Part]:
  """What reads a patch: the same for both kinds of model."""
  sizes, held = job.run.model, job.positions if job.full else job.positions / 2
  projections = flops.transformer_per_position(sizes, 0)
  attention = sizes.layers * 2 * 2 * sizes.width * held
  cached = sizes.layers * 2 * held * sizes.width * sizes.kv_heads // sizes.heads
  weights = projections / 2  # A weight is a multiply-add.
  return [
    Part("backbone", projections, weights * job.weight_bytes / job.batch),
    Part("attention", attention, cached * job.weight_bytes),
  ]


def _vocabulary(job: Job, width: int, tokens: float, rounds: float) -> Part:
  """Logits of so many tokens, and what reads them."""
  table = width * job.vocab_size
  logits = 2 * 4 * tokens * job.vocab_size
  return Part(
    "vocabulary", 2 * tokens * table, rounds * table * job.weight_bytes / job.batch + logits
  )


def _calm(job: Job, run: config.CalmRun, codec: config.Autoencoder) -> list[Part]:
  entry = flops.input_per_patch(run.model, codec)
  shared, sample = flops.head_parts(run.head, run.model.width, codec.latent)
  if job.full:  # The paper's count repeats for each sample what they share.
    shared, sample = 0.0, shared + sample
  decoder = flops.decoder_per_patch(codec, 0)
  weights = job.weight_bytes / job.batch

  def drawn(name: str, each: float, held: float) -> Part:
    return Part(name, job.draws * each, job.rounds * held * weights)

  return [
    *_backbone(job),
    Part("input", entry, entry / 2 * weights),
    Part("head, once", shared, shared / 2 * weights),
    drawn("head, draws", sample, sample / 2),
    drawn("decoder", decoder, flops.decoder_weights(codec)),
    _vocabulary(job, codec.width, job.draws * codec.patch_size, job.rounds),
  ]


def parts(job: Job) -> list[Part]:
  """Returns the parts of writing, each a token."""
  if isinstance(job.run, config.TransformerRun):
    found = [*_backbone(job), _vocabulary(job, job.run.model.width, 1, 1)]
  else:
    assert job.codec is not None
    found = _calm(job, job.run, job.codec)
  return [Part(x.name, x.flops / job.patch_size, x.bytes / job.patch_size) for x in found]


def seconds(found: list[Part], chip: topologies.Chip) -> tuple[float, str]:
  """Returns the roofline time of a token, and what bounds it: compute or memory."""
  compute = sum(part.flops for part in found) / chip.peak
  memory = sum(part.bytes for part in found) / chip.bandwidth
  return max(compute, memory), "compute" if compute > memory else "memory"
