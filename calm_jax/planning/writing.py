"""A generation job and a chip -> FLOPs, bytes and seconds per generated token."""

from calm_jax.generation import cost
from calm_jax.planning.compiled import topologies
from calm_jax.stages import table


def parts(job: cost.WritingJob) -> list[cost.Part]:
  """Returns the cost per generated token, by part of the model; the stage must generate text."""
  spec = table.of(job.run)
  assert spec.writing is not None
  size = spec.patch_size(job.run)
  patch_parts = spec.writing.parts(job)
  return [cost.Part(part.name, part.flops / size, part.bytes / size) for part in patch_parts]


def seconds(token_parts: list[cost.Part], chip: topologies.Chip) -> tuple[float, str]:
  """Returns the roofline time of a token in seconds, and its bound: "compute" or "memory"."""
  compute = sum(part.flops for part in token_parts) / chip.peak
  memory = sum(part.bytes for part in token_parts) / chip.bandwidth
  return max(compute, memory), "compute" if compute > memory else "memory"
