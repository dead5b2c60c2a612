"""The published table of costs, beside what its own way of counting gives, and the true cost.

The paper counts a step of writing with one draw a patch at a full window, attention to all
of it, and what the samples share once a sample; training with attention to all positions,
also those a causal mask hides, and 5e11 tokens. Found by trying: so all figures come
out within 3 % but the three named in `APART`. (Of those CALM-L's training is given as
7.9e20 elsewhere in the paper, which ours is within 3 % of.)
"""

import dataclasses

from calm_jax import config
from calm_jax.models import flops
from calm_jax.planning import writing

VOCAB, CODEC = config.Companions().vocab_size, config.Companions().autoencoder
TOKENS = 250_000 * 2_000_000
WINDOW = 2048  # Of patches, and of the baseline's tokens.


@dataclasses.dataclass(frozen=True)
class Row:
  """A published model: FLOPs of all training, and of writing a token."""

  name: str
  run: config.CalmRun | config.TransformerRun
  training: float
  writing: float
  brier_lm: float

  @property
  def codec(self) -> config.Autoencoder | None:
    return CODEC if isinstance(self.run, config.CalmRun) else None


def _calm(width: int, ffn: int) -> config.CalmRun:
  return config.CalmRun(model=config.Backbone(layers=16, width=width, ffn=ffn))


def _transformer(layers: int, width: int, ffn: int) -> config.TransformerRun:
  return config.TransformerRun(model=config.Transformer(layers=layers, width=width, ffn=ffn))


ROWS = (
  Row("CALM-M", _calm(1024, 2752), 3.7e20, 2.9e8, 5.72),
  Row("CALM-L", _calm(1536, 4096), 7.7e20, 4.6e8, 6.58),
  Row("CALM-XL", _calm(2560, 6880), 19.5e20, 9.4e8, 8.53),
  Row("Transformer-S", _transformer(12, 768, 2048), 6.6e20, 4.4e8, 6.05),
  Row("Transformer-M", _transformer(16, 1024, 2752), 11.9e20, 7.9e8, 7.07),
  Row("Transformer-L", _transformer(16, 1536, 4096), 22.5e20, 15.0e8, 8.98),
)
# Each CALM's Transformer of about equal BrierLM.
EQUALS = dict(zip((row.name for row in ROWS[:3]), ROWS[3:], strict=True))
# More than 3 % from the paper's: (row, column).
APART = {("CALM-L", "training"), ("CALM-XL", "training"), ("CALM-XL", "writing")}


def counted_training(row: Row) -> float:
  """FLOPs of all training by the paper's count."""
  parts = flops.train_parts(row.run, row.codec, VOCAB)
  return (sum(parts.values()) + parts["attention"]) * TOKENS


def counted_writing(row: Row) -> float:
  """FLOPs of a token by the paper's count."""
  job = writing.Job(row.run, row.codec, VOCAB, WINDOW, full=True)
  return sum(part.flops for part in writing.parts(job))


def true_writing(row: Row, draws: float = 1.0) -> float:
  """FLOPs of a token in the middle of the window, with so many draws a patch."""
  job = writing.Job(row.run, row.codec, VOCAB, WINDOW, draws=draws)
  return sum(part.flops for part in writing.parts(job))
