"""Where a generative head is chosen: one row a head."""

from calm_jax import config, errors
from calm_jax.models import energy_head

HEADS = {"energy": energy_head.EnergyHead}


def build(sizes: config.Head, latent: int, init: str, dtype) -> energy_head.EnergyHead:
  """Returns the head that `sizes.kind` names.

  Raises:
    CalmError: for a kind that is no row of HEADS.
  """
  if sizes.kind not in HEADS:
    raise errors.CalmError(f"head.kind is {sizes.kind!r}: {config.nearest(sizes.kind, HEADS)}")
  return HEADS[sizes.kind](sizes, latent, init, dtype)
