"""Where a generative head is chosen: one row a head."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
from jax import numpy as jnp

from calm_jax import config, errors
from calm_jax.models import diffusion_head, energy_head, flow_head


class Head(Protocol):
  """Hidden states -> samples of the next latent, as pure functions of parameters.

  Attributes:
    noise_shape: of the noise that one sample takes.
  """

  noise_shape: tuple[int, ...]

  def init(self, key: jax.Array) -> Any:
    """Returns initial parameters."""
    ...

  def draw_noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns noise [*shape, *noise_shape]."""
    ...

  def condition(self, params: Any, hidden_D: jax.Array) -> Any:
    """Returns what all samples of hidden states [..., D] share: arrays [..., *]."""
    ...

  def samples(self, params: Any, condition: Any, noise: jax.Array) -> jax.Array:
    """Returns latents [N, ..., Z], given `condition` and noise [N, ..., *noise_shape]."""
    ...

  def sample(self, params: Any, hidden_D: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """Returns `count` latents [N, ..., Z]; those of a given key are the same on every call."""
    ...


HEADS: dict[str, Callable[..., Head]] = {
  "energy": energy_head.EnergyHead,
  "flow": flow_head.FlowHead,
  "diffusion": diffusion_head.DiffusionHead,
}


def build(
  sizes: config.Head, width: int, latent: int, init: str, dtype: jnp.dtype, remat: str = "none"
) -> Head:
  """Returns the head that `sizes.kind` names, for hidden states of `width`.

  Args:
    remat: what the backward pass recomputes of its blocks; see `models.remat`.

  Raises:
    CalmError: for a kind that is no row of HEADS.
  """
  if sizes.kind not in HEADS:
    raise errors.CalmError(f"head.kind is {sizes.kind!r}: {config.nearest(sizes.kind, HEADS)}")
  return HEADS[sizes.kind](sizes, width, latent, init, dtype, remat)
