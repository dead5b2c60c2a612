"""Layers that all models share: initial values, norms, Linear, SwiGLU."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax.kernels import dense
from calm_jax.models import remat

EPS = 1e-6


def apply(module: nn.Module, params: Any, *args: Any, method: Any = None) -> Any:
  """Returns the result of a method of `module`, by default `__call__`, with these parameters."""
  return module.apply({"params": params}, *args, method=method)


def in_chunks(function: Callable[[Any], Any], tree: Any, size: int) -> Any:
  """Returns function(tree) for arrays [n, ...], computed for at most `size` rows at a time."""
  count = jax.tree.leaves(tree)[0].shape[0]
  size = min(size, count)
  padding = -count % size  # The last chunk is padded with the first rows.

  def cut(x):
    return jnp.concatenate([x, x[:padding]]).reshape(-1, size, *x.shape[1:])

  def joined(x):
    return x.reshape(-1, *x.shape[2:])[:count]

  return jax.tree.map(joined, jax.lax.map(function, jax.tree.map(cut, tree)))


def kernel_init(scheme: str, share: float = 1.0) -> nn.initializers.Initializer:
  """Returns the initializer of a weight matrix.

  Args:
    scheme: `reference` is normal with std 0.02 (the published recipe), `fan_in` normal
      with std 1/sqrt(fan_in).
    share: the matrix's inputs as a share of all inputs that the layer sums over; below 1
      where one Linear of the paper is stored as two matrices.
  """
  if scheme == "reference":
    return nn.initializers.normal(0.02)
  return nn.initializers.variance_scaling(share, "fan_in", "normal")


def embedding_init(scheme: str, width: int) -> nn.initializers.Initializer:
  """Returns the initializer of a token table [V, width], tied or untied."""
  return nn.initializers.normal(0.02 if scheme == "reference" else width**-0.5)


def linear(
  name: str | None,
  features: int,
  init: str,
  dtype: jnp.dtype,
  *,
  bias: bool = True,
  share: float = 1.0,
) -> nn.Dense:
  """Returns a Linear layer with float32 parameters that computes in `dtype`.

  Args:
    name: None in a module's `setup`, where the attribute is the name.
    init, share: see `kernel_init`.
  """
  return nn.Dense(
    features,
    use_bias=bias,
    dtype=dtype,
    kernel_init=kernel_init(init, share),
    dot_general=dense.dot_general,
    name=name,
  )


def rms_norm(name: str | None, dtype: jnp.dtype) -> nn.RMSNorm:
  """Returns an RMSNorm that is recomputed in the backward pass."""
  return remat.recomputed(nn.RMSNorm)(epsilon=EPS, dtype=dtype, name=name)


def layer_norm(name: str | None, dtype: jnp.dtype) -> nn.LayerNorm:
  """Returns a LayerNorm with scale and bias."""
  return nn.LayerNorm(epsilon=EPS, dtype=dtype, name=name)


class SwiGLU(nn.Module):
  """down(SiLU(gate x) * up x) without biases: [..., D] -> [..., F] -> [..., D]."""

  ffn: int
  scheme: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_D):
    gate_F = linear("gate", self.ffn, self.scheme, self.dtype, bias=False)(x_D)
    up_F = linear("up", self.ffn, self.scheme, self.dtype, bias=False)(x_D)

    def gated(module, gate_F, up_F):
      down = linear("down", x_D.shape[-1], self.scheme, self.dtype, bias=False)
      return down(nn.silu(gate_F) * up_F)

    return remat.recomputed(gated)(self, gate_F, up_F)
