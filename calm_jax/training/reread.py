"""A saved tree -> lines of fingerprint, on the host and a few arrays at a time."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from calm_jax.training import fingerprint

# Bytes that are read at once, where no single array is larger.
BYTES = 2**28


def lines(folder: epath.Path, leaves: list[str] | None = None) -> dict[str, str]:
  """Returns `fingerprint.lines` of a saved tree, or of those of its leaves.

  Raises whatever Orbax and TensorStore raise at damage.
  """
  handler = ocp.PyTreeCheckpointHandler()
  tree = handler.metadata(folder).tree
  saved = _leaves(tree)
  found: dict[str, str] = {}
  for group in _groups({name: saved[name] for name in (saved if leaves is None else leaves)}):

    def wanted(path, leaf, group=group):
      taken = fingerprint.name(path) in group
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if taken else ocp.PLACEHOLDER

    item = jax.tree_util.tree_map_with_path(wanted, tree)
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    read = handler.restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=how))
    found |= fingerprint.host_lines(
      jax.tree.map(lambda leaf: None if leaf is ocp.PLACEHOLDER else leaf, read)
    )
  return found


def _leaves(tree: Any) -> dict[str, Any]:
  return {fingerprint.name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _groups(leaves: Mapping[str, Any]) -> list[set[str]]:
  """Returns the names in groups of up to BYTES."""
  groups, size = [], 0
  for name, leaf in leaves.items():
    own = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    if not groups or size + own > BYTES:
      groups.append(set())
      size = 0
    groups[-1].add(name)
    size += own
  return groups
