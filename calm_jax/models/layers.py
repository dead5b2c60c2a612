"""What every model shares: initial values, norms, SwiGLU."""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax.parallel import mesh

EPS = 1e-6
TILES = 64  # Of a vocabulary, at most: a whole one is a multiple of them.


def apply(module: nn.Module, params: Any, *args: Any, method: Any = None) -> Any:
  """Returns what a method of `module`, by default its call, gives with these parameters."""
  return module.apply({"params": params}, *args, method=method)


def in_chunks(function: Callable[[Any], Any], tree: Any, size: int) -> Any:
  """Returns what a function gives for arrays [n, ...], of which it is given `size` at a time."""
  count = jax.tree.leaves(tree)[0].shape[0]
  size = min(size, count)
  more = -count % size  # The last chunk is filled up with the first rows.

  def cut(x):
    return jnp.concatenate([x, x[:more]]).reshape(-1, size, *x.shape[1:])

  def joined(x):
    return x.reshape(-1, *x.shape[2:])[:count]

  return jax.tree.map(joined, jax.lax.map(function, jax.tree.map(cut, tree)))


def _first_highest(logits_V: jax.Array) -> jax.Array:
  """The same as argmax in two passes of floats, which XLA's CPU compiler makes vectors of."""
  count = logits_V.shape[-1]
  assert count < 2**24, count
  back_V = jnp.arange(count, 0, -1, dtype=jnp.float32)
  highest = jnp.max(logits_V, axis=-1, keepdims=True)
  back_V = jnp.where(logits_V == highest, jnp.broadcast_to(back_V, logits_V.shape), 0.0)
  # Without a number among the logits there is none.
  return jnp.minimum(count - jnp.max(back_V, axis=-1).astype(jnp.int32), count - 1)


def _first_highest_by_tiles(logits_V: jax.Array) -> jax.Array:
  """The same: of tiles by their maxima, which a CPU computes with the product, then in one."""
  tiles = math.gcd(logits_V.shape[-1], TILES)
  logits_Tv = logits_V.reshape(*logits_V.shape[:-1], tiles, -1)
  tile = _first_highest(jnp.max(logits_Tv, axis=-1))
  logits_v = jnp.take_along_axis(logits_Tv, tile[..., None, None], axis=-2)[..., 0, :]
  return tile * logits_v.shape[-1] + _first_highest(logits_v)


def most_likely(logits_V: jax.Array) -> jax.Array:
  """Returns the index of the highest logit, the first of equals: [..., V] -> int32 [...]."""
  return jax.lax.platform_dependent(
    logits_V,
    cpu=_first_highest_by_tiles,
    default=lambda logits_V: jnp.argmax(logits_V, axis=-1).astype(jnp.int32),
  )


def kernel_init(scheme: str, share: float = 1.0) -> nn.initializers.Initializer:
  """Returns the initializer of a weight matrix.

  Args:
    scheme: `reference` is normal with std 0.02 (the published recipe), `fan_in`
      normal with std 1/sqrt(fan_in).
    share: the part that this matrix's inputs are of all that the layer sums
      over; below 1 where one Linear of the paper is held as two matrices.
  """
  if scheme == "reference":
    return nn.initializers.normal(0.02)
  return nn.initializers.variance_scaling(share, "fan_in", "normal")


def embedding_init(scheme: str, width: int) -> nn.initializers.Initializer:
  """Returns the initializer of a token table (V, width), tied or not."""
  return nn.initializers.normal(0.02 if scheme == "reference" else width**-0.5)


@jax.custom_vjp
def _product(x_I: jax.Array, kernel_IO: jax.Array) -> jax.Array:
  return jax.lax.dot_general(x_I, kernel_IO, (((x_I.ndim - 1,), (0,)), ((), ())))


def _product_forward(x_I, kernel_IO):
  return _product(x_I, kernel_IO), (x_I, kernel_IO)


def _product_backward(known, slope_O):
  x_I, kernel_IO = known
  shape, (x_I, slope_O) = x_I.shape, (mesh.rows(x_I), mesh.rows(slope_O))
  lead, last = tuple(range(x_I.ndim - 1)), x_I.ndim - 1
  of_x_I = jax.lax.dot_general(slope_O, kernel_IO, (((last,), (1,)), ((), ())))
  of_kernel_IO = jax.lax.dot_general(x_I, slope_O, ((lead, lead), ((), ())))
  return of_x_I.reshape(shape), of_kernel_IO


_product.defvjp(_product_forward, _product_backward)


def dot_general(
  x_I: jax.Array, kernel_IO: jax.Array, dimension_numbers: Any, precision: Any = None
) -> jax.Array:
  """Returns x · kernel, as nn.Dense has it, [..., I] and [I, O] -> [..., O].

  The kernel's gradient is computed as x · slope. JAX's own rule computes its transpose, for
  which a CPU transposes the slope, and all that it is made of, in place of x.
  """
  assert dimension_numbers == (((x_I.ndim - 1,), (0,)), ((), ())), dimension_numbers
  assert precision is None, precision
  return _product(x_I, kernel_IO)


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
    name: None in a module's `setup`, where the attribute names it.
  """
  return nn.Dense(
    features,
    use_bias=bias,
    dtype=dtype,
    kernel_init=kernel_init(init, share),
    dot_general=dot_general,
    name=name,
  )


def _computed_again(part: Any) -> Any:
  """Returns a module's class, or a function of one, that keeps its inputs alone for the gradient.

  For what costs no product of matrices. A loop over layers stacks all that is kept: it is
  written, cut out again and copied, in float32 where that is what a norm computes in.
  """
  return nn.remat(part, prevent_cse=False)


def rms_norm(name: str | None, dtype: jnp.dtype) -> nn.RMSNorm:
  return _computed_again(nn.RMSNorm)(epsilon=EPS, dtype=dtype, name=name)


def layer_norm(name: str | None, dtype: jnp.dtype) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=EPS, dtype=dtype, name=name)


class SwiGLU(nn.Module):
  """down(SiLU(gate x) * up x), no biases: [..., D] -> [..., D] through width F."""

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

    return _computed_again(gated)(self, gate_F, up_F)
