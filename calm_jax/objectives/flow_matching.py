"""Latents -> points between noise and latent, and velocities -> the flow-matching loss."""

import jax
from jax import numpy as jnp


def between(t_N: jax.Array, start_NZ: jax.Array, z_NZ: jax.Array) -> jax.Array:
  """Returns the point at time t in [0, 1] on the line from noise to latent, [..., Z]."""
  return (1 - t_N[..., None]) * start_NZ + t_N[..., None] * z_NZ


def flow_matching_loss(velocity_NZ: jax.Array, start_NZ: jax.Array, z_NZ: jax.Array) -> jax.Array:
  """Mean squared error of the velocity on the line from noise to latent: [..., Z] -> [...].

  Lower is better; latent units squared, averaged over Z. The minimum is above 0, because many
  lines cross at a point.

  Source: CALM (arXiv:2510.27688), section 7.4; rectified flow (arXiv:2209.03003).
  """
  return jnp.mean(jnp.square(velocity_NZ - (z_NZ - start_NZ)), axis=-1)
