"""Arrays -> 16 hex digits over their bits, computed on devices or on the host, equal on both."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

Tree = Any

# Odd 32-bit constants that spread positions and bits: the golden ratio and MurmurHash3's.
_POSITION, _FIRST, _SECOND, _THIRD = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x2C1B3C6D
# Elements that the host processes at once.
_CHUNK = 2**18


def _mix(bits: Any, position: Any, number: Any) -> tuple[Any, Any]:
  """Returns two uint32 for each element, from its bits and its position in the leaf.

  The mix is not linear, so that neither swapped elements nor pairs of changes cancel in a sum.
  """
  h = bits ^ (position * number(_POSITION))
  h = (h ^ (h >> number(16))) * number(_FIRST)
  h = (h ^ (h >> number(13))) * number(_SECOND)
  h = h ^ (h >> number(16))
  return h, (h ^ (h >> number(15))) * number(_THIRD)


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
  """Returns two uint32 for each leaf: wrapping sums, equal for every sharding.

  One program computes all: many programs with sums over devices can block each other.
  """

  def leaf_sums(leaf):
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
      stride = math.prod(leaf.shape[axis + 1 :]) % 2**32
      along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
      position += along * jnp.uint32(stride)
    # One pass for both sums: in two, their shared input, as large as the leaf, is stored.
    zeros, axes = (jnp.uint32(0), jnp.uint32(0)), tuple(range(leaf.ndim))
    mixed = _mix(bits, position, jnp.uint32)
    return jax.lax.reduce(mixed, zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), axes)

  return [leaf_sums(leaf) for leaf in leaves]


def _line(leaf: Any, sums: Any) -> str:
  return f"{tuple(leaf.shape)} {leaf.dtype} {int(sums[0]):08x}{int(sums[1]):08x}"


def name(path: Any) -> str:
  """Returns a leaf's name from its path, equal for a tree and for Orbax's form of it."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _names(tree: Tree) -> list[str]:
  return [name(path) for path, _ in jax.tree.leaves_with_path(tree)]


def lines(tree: Tree) -> dict[str, str]:
  """Returns a line for each leaf, by name: shape, type and a 64-bit hash of its elements."""
  leaves = jax.tree.leaves(tree)
  sums = jax.device_get(_sums(leaves))
  return dict(zip(_names(tree), map(_line, leaves, sums), strict=True))


def host_lines(tree: Tree) -> dict[str, str]:
  """Returns `lines` of a tree of NumPy arrays, computed without a device."""
  return {
    leaf_name: _line(leaf, _host_sums(leaf))
    for leaf_name, leaf in zip(_names(tree), jax.tree.leaves(tree), strict=True)
  }


def _host_sums(leaf: np.ndarray) -> tuple[int, int]:
  flat = np.ascontiguousarray(leaf).reshape(-1).view(f"uint{8 * leaf.dtype.itemsize}")
  total = [0, 0]
  for start in range(0, flat.size, _CHUNK):
    bits = flat[start : start + _CHUNK].astype(np.uint32)
    position = (np.arange(bits.size, dtype=np.uint64) + start).astype(np.uint32)
    for i, mixed in enumerate(_mix(bits, position, np.uint32)):
      total[i] += int(np.sum(mixed, dtype=np.uint64))
  return total[0] % 2**32, total[1] % 2**32


def digest(lines: Mapping[str, str]) -> str:
  """Returns 16 hex digits over the lines of all leaves."""
  text = "\n".join(f"{leaf} {lines[leaf]}" for leaf in sorted(lines))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def of(tree: Tree) -> str:
  """Returns 16 hex digits over the bits, positions, names and shapes of all leaves.

  They are equal for every sharding and mesh. They detect damage and mistakes, not malice.
  """
  return digest(lines(tree))
