"""The table of generative heads: one row per head, `config.Head.kind` is its name."""

from calm_jax import config, errors
from calm_jax.models.heads import diffusion, energy, flow, head

HEADS: dict[str, type[head.Head]] = {
  "energy": energy.EnergyHead,
  "flow": flow.FlowHead,
  "diffusion": diffusion.DiffusionHead,
}


def lookup(sizes: config.Head) -> type[head.Head]:
  """Returns the row of HEADS that `sizes.kind` names.

  Raises:
    CalmError: for an unknown kind, or too few sampling steps for it.
  """
  if sizes.kind not in HEADS:
    raise errors.CalmError(f"head.kind is {sizes.kind!r}: {config.nearest(sizes.kind, HEADS)}")
  fewest = HEADS[sizes.kind].fewest_steps
  config.require(
    sizes.steps == 0 or sizes.steps >= fewest,
    f"config.head.steps must be 0 or lie in [{fewest}, {config.MOST_STEPS}], got {sizes.steps}",
  )
  return HEADS[sizes.kind]


def build(sizes: config.Head, trunk: head.Trunk) -> head.Head:
  """Returns the head that `sizes.kind` names.

  Raises:
    CalmError: as `lookup` does.
  """
  return lookup(sizes)(sizes, trunk)
