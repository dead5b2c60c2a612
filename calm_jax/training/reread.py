"""Saved tree -> fingerprint lines, read on the host, a few arrays at a time."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from calm_jax.training import fingerprint

# Bytes that are read at once, unless a single array is larger.
BYTES = 2**28


def lines(folder: epath.Path, leaves: list[str] | None = None) -> dict[str, str]:
  """Returns `fingerprint.lines` of a saved tree, or of `leaves` of it only.

  If the tree is damaged, errors of Orbax and TensorStore are raised.
  """
  handler = ocp.PyTreeCheckpointHandler()
  tree = handler.metadata(folder).tree
  saved = _leaves(tree)
  result: dict[str, str] = {}
  for group in _groups({name: saved[name] for name in (saved if leaves is None else leaves)}):

    def abstract(path, leaf, group=group):
      in_group = fingerprint.name(path) in group
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if in_group else ocp.PLACEHOLDER

    item = jax.tree_util.tree_map_with_path(abstract, tree)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    read = handler.restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=as_numpy))
    result |= fingerprint.host_lines(
      jax.tree.map(lambda leaf: None if leaf is ocp.PLACEHOLDER else leaf, read)
    )
  return result


def _leaves(tree: Any) -> dict[str, Any]:
  return {fingerprint.name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _groups(leaves: Mapping[str, Any]) -> list[set[str]]:
  """Returns the names of the leaves in groups of up to BYTES."""
  groups, size = [], 0
  for name, leaf in leaves.items():
    leaf_size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    if not groups or size + leaf_size > BYTES:
      groups.append(set())
      size = 0
    groups[-1].add(name)
    size += leaf_size
  return groups
