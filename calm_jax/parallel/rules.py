"""Parameters -> where they lie on the mesh: one table, and each parameter matches one row.

The optimizer's state and the gradients follow their parameters. A matrix is held
(in, out). `tensor` divides the wide side of a pair of matrices, so that a layer
needs one sum over devices at its end; fsdp, with sequence, divides the other side.
"""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from calm_jax import errors

_FSDP = ("fsdp", "sequence")

# (what it is, its path's end, how its last axes lie). Axes before them, as that of
# stacked layers, are whole everywhere, and so is what has no axes named here.
RULES: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
  ("token table", r"embed/embedding", ("tensor", _FSDP)),
  ("output table", r"(?<!attention/)(?<!head/)\bout/kernel", (_FSDP, "tensor")),
  (
    "into the width",
    r"\b(query|key|value|gate|up|gate_up|sample_in|hidden_in|noise_in|latent_in|time_in"
    r"|modulation|squeeze|from_latent)/kernel",
    (_FSDP, "tensor"),
  ),
  (
    "out of the width",
    r"\b(attention/out|head/out|down|middle|time_out|posterior|expand)/kernel",
    ("tensor", _FSDP),
  ),
  ("vector", r"\b(bias|scale)", ()),
  ("counter", r"\b(count|step|skipped|skipped_in_a_row)", ()),
)
_RULES = tuple((name, re.compile(f"(^|/)(.*/)?{path}$"), axes) for name, path, axes in RULES)

# Unsharded parameters are refused above this share of all and this size.
MOST_UNSHARDED, FEW_BYTES = 0.02, 2**24


def matching(path: str) -> list[tuple[str, tuple[Any, ...]]]:
  """Returns (name, axes) of every rule that a path matches."""
  return [(name, axes) for name, pattern, axes in _RULES if pattern.search(path)]


def path_name(path: tuple[Any, ...]) -> str:
  """Returns a leaf's path as names joined by a slash."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """Returns how one parameter lies. An axis that its size can't be divided by is left out.

  Raises:
    CalmError: unless exactly one rule matches.
  """
  found = matching(path)
  if len(found) != 1:
    raise errors.CalmError(
      f"parameter {path} matches {len(found)} rows of parallel.rules.RULES: each must match one"
    )
  axes = found[0][1]
  lead = (None,) * (len(shape) - len(axes))
  own = zip(axes, shape[len(lead) :], strict=True)
  return PartitionSpec(*lead, *(_fitting(axis, size, mesh) for axis, size in own))


def _fitting(axis: Any, size: int, mesh: Mesh) -> Any:
  """Returns the first axes of a rule's that divide `size` evenly."""
  names = (axis,) if isinstance(axis, str) else axis
  while names and size % math.prod(mesh.shape[name] for name in names):
    names = names[:-1]
  return names or None


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns the sharding of every leaf of a tree of parameters, gradients or state."""

  def one(path, leaf):
    return NamedSharding(mesh, spec(path_name(path), leaf.shape, mesh))

  return jax.tree.map_with_path(one, tree)


def constrain(tree: Any) -> Any:
  """Says, inside a program, that a tree of parameters or gradients lies by the rules."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree
  return jax.tree.map_with_path(
    lambda path, x: jax.lax.with_sharding_constraint(x, spec(path_name(path), x.shape, mesh)), tree
  )


def abstract(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns shapes, dtypes and places of `tree`, which may be abstract itself."""
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    tree,
    shardings(tree, mesh),
  )


@dataclasses.dataclass(frozen=True)
class Placed:
  """How one parameter lies; bytes are those of all devices, copies counted once."""

  path: str
  rule: str
  shape: tuple[int, ...]
  spec: PartitionSpec
  bytes: int
  parts: int


def placed(tree: Any, mesh: jax.sharding.Mesh) -> list[Placed]:
  """Returns how every leaf of `tree` lies."""
  result = []
  for path, leaf in jax.tree.leaves_with_path(tree):
    name = path_name(path)
    where = spec(name, leaf.shape, mesh)
    shard = NamedSharding(mesh, where).shard_shape(leaf.shape)
    parts = math.prod(leaf.shape) // max(1, math.prod(shard))
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    result.append(Placed(name, matching(name)[0][0], leaf.shape, where, size, parts))
  return result


def table(rows: list[Placed]) -> str:
  """Returns the rows as text, for people."""
  lines = [
    f"{row.path}  {list(row.shape)}  {row.rule}  {row.spec}  {row.parts} parts" for row in rows
  ]
  return "\n".join(lines)


def require_sharded(tree: Any, mesh: jax.sharding.Mesh) -> float:
  """Returns the share of bytes that lie whole on every device of fsdp.

  Raises:
    CalmError: if it is more than MOST_UNSHARDED of more than a few bytes.
  """
  rows = placed(tree, mesh)
  whole = [row for row in rows if row.parts == 1]
  size, total = sum(row.bytes for row in whole), sum(row.bytes for row in rows)
  share = size / total
  if mesh.shape["fsdp"] > 1 and share > MOST_UNSHARDED and size > FEW_BYTES:
    largest = max(whole, key=lambda row: row.bytes)
    raise errors.CalmError(
      f"{share:.1%} of the parameters can't be divided by fsdp={mesh.shape['fsdp']}, the largest "
      f"is {largest.path} {list(largest.shape)}: choose an fsdp that divides its sizes"
    )
  return share
