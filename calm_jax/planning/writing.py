"""A writing job and a chip -> FLOPs, bytes and seconds of a token."""

from calm_jax.generation import cost
from calm_jax.planning.compiled import topologies
from calm_jax.stages import table


def parts(job: cost.WritingJob) -> list[cost.Part]:
  """Returns the parts of writing a token, for a run whose stage writes text."""
  spec = table.of(job.run)
  assert spec.writing is not None
  size = spec.patch_size(job.run)
  a_patch = spec.writing.parts(job)
  return [cost.Part(part.name, part.flops / size, part.bytes / size) for part in a_patch]


def seconds(token_parts: list[cost.Part], chip: topologies.Chip) -> tuple[float, str]:
  """Returns a token's time by the roofline, and what bounds it: "compute" or "memory"."""
  compute = sum(part.flops for part in token_parts) / chip.peak
  memory = sum(part.bytes for part in token_parts) / chip.bandwidth
  return max(compute, memory), "compute" if compute > memory else "memory"
