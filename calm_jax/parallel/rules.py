"""Parameters -> their sharding: one table, of which each parameter matches exactly one row.

Optimizer state and gradients are sharded as their parameters. Matrices are stored [in, out].
`tensor` divides the inner width between a pair of matrices, so that the pair needs one sum over
devices at its end; `fsdp`, together with `sequence`, divides the other axis.
"""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from calm_jax import errors

_FSDP = ("fsdp", "sequence")

# (kind of parameter, end of its path, axes of the mesh that divide its last axes). Leading axes,
# such as that of stacked layers, are not divided, and neither are parameters without axes here.
RULES: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
  ("token table", r"embed/embedding", ("tensor", _FSDP)),
  ("output table", r"(?<!attention/)(?<!head/)\bout/kernel", (_FSDP, "tensor")),
  (
    "into the width",
    r"\b(query|key|value|gate|up|gate_up|sample_in|hidden_in|noise_in|latent_in|time_in|power_in"
    r"|modulation|squeeze|from_latent)/kernel",
    (_FSDP, "tensor"),
  ),
  (
    "out of the width",
    r"\b(attention/out|head/out|down|middle|time_out|power_out|posterior|expand)/kernel",
    ("tensor", _FSDP),
  ),
  ("vector", r"\b(bias|scale)", ()),
  ("counter", r"\b(count|step|skipped|skipped_in_a_row)", ()),
)
_RULES = tuple((name, re.compile(f"(^|/)(.*/)?{path}$"), axes) for name, path, axes in RULES)

# Undivided parameters are refused above this share of all bytes and this size.
MOST_UNSHARDED, FEW_BYTES = 0.02, 2**24


def matching(path: str) -> list[tuple[str, tuple[Any, ...]]]:
  """Returns (name, axes) of every rule that a path matches."""
  return [(name, axes) for name, pattern, axes in _RULES if pattern.search(path)]


def path_name(path: tuple[Any, ...]) -> str:
  """Returns a leaf's path as names joined by a slash."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """Returns the partition of one parameter, without axes of the mesh that don't divide its size.

  Raises:
    CalmError: unless exactly one rule matches.
  """
  matches = matching(path)
  if len(matches) != 1:
    raise errors.CalmError(
      f"parameter {path} matches {len(matches)} rows of parallel.rules.RULES: each must match one"
    )
  axes = matches[0][1]
  lead = (None,) * (len(shape) - len(axes))
  own = zip(axes, shape[len(lead) :], strict=True)
  return PartitionSpec(*lead, *(_fitting(axis, size, mesh) for axis, size in own))


def _fitting(axis: Any, size: int, mesh: Mesh) -> Any:
  """Returns as many of a rule's axes, from the first, as divide `size` evenly together."""
  names = (axis,) if isinstance(axis, str) else axis
  while names and size % math.prod(mesh.shape[name] for name in names):
    names = names[:-1]
  return names or None


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns the sharding of each leaf of a tree of parameters, gradients or state."""

  def sharding(path, leaf):
    return NamedSharding(mesh, spec(path_name(path), leaf.shape, mesh))

  return jax.tree.map_with_path(sharding, tree)


def constrain(tree: Any) -> Any:
  """Constrains a tree of parameters or gradients, inside a program, to the rules' shardings."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree
  return jax.tree.map_with_path(
    lambda path, x: jax.lax.with_sharding_constraint(x, spec(path_name(path), x.shape, mesh)), tree
  )


def abstract(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns shapes, dtypes and shardings of the leaves of `tree`, which may be abstract itself."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    tree,
    shardings(tree, mesh),
  )


@dataclasses.dataclass(frozen=True)
class Placed:
  """The sharding of one parameter.

  Attributes:
    rule: kind of parameter, the first column of RULES.
    bytes: bytes of the parameter, without copies on several devices.
    parts: number of different shards; 1 if every device holds all of it.
  """

  path: str
  rule: str
  shape: tuple[int, ...]
  spec: PartitionSpec
  bytes: int
  parts: int


def placed(tree: Any, mesh: jax.sharding.Mesh) -> list[Placed]:
  """Returns the sharding of each leaf of `tree`."""
  result = []
  for path, leaf in jax.tree.leaves_with_path(tree):
    name = path_name(path)
    partition = spec(name, leaf.shape, mesh)
    shard = NamedSharding(mesh, partition).shard_shape(leaf.shape)
    parts = math.prod(leaf.shape) // max(1, math.prod(shard))
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    result.append(Placed(name, matching(name)[0][0], leaf.shape, partition, size, parts))
  return result


def table(rows: list[Placed]) -> str:
  """Returns a printable table, one line per parameter."""
  lines = [
    f"{row.path}  {list(row.shape)}  {row.rule}  {row.spec}  {row.parts} parts" for row in rows
  ]
  return "\n".join(lines)


def require_sharded(tree: Any, mesh: jax.sharding.Mesh) -> float:
  """Returns the share of bytes that are on every device, undivided.

  Raises:
    CalmError: if fsdp is above 1, the share above MOST_UNSHARDED and the bytes above FEW_BYTES.
  """
  rows = placed(tree, mesh)
  replicated = [row for row in rows if row.parts == 1]
  size, total = sum(row.bytes for row in replicated), sum(row.bytes for row in rows)
  share = size / total
  if mesh.shape["fsdp"] > 1 and share > MOST_UNSHARDED and size > FEW_BYTES:
    largest = max(replicated, key=lambda row: row.bytes)
    raise errors.CalmError(
      f"{share:.1%} of the parameters can't be divided by fsdp={mesh.shape['fsdp']}, the largest "
      f"is {largest.path} {list(largest.shape)}: choose an fsdp that divides its sizes"
    )
  return share
