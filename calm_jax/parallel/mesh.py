"""Devices -> a mesh of four axes, and how arrays of activations lie on it.

GSPMD does the rest: a program is written as if for one device, and
`constrain` says at a few places how an activation lies.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from calm_jax import config, errors

AXES = ("data", "fsdp", "sequence", "tensor")
# What an axis of an array means -> the axes of the mesh that divide it.
ALONG: dict[str | None, Any] = {
  None: None,
  "batch": ("data", "fsdp"),
  "position": "sequence",
  "width": "tensor",
}


def sizes(settings: config.Mesh, devices: int, slices: int = 1) -> dict[str, int]:
  """Returns the size of each axis on so many devices, -1 replaced.

  Raises:
    CalmError: if the axes don't divide the devices, or `data` not the slices.
  """
  given = dataclasses.asdict(settings)
  told = ", ".join(f"{name}={size}" for name, size in given.items())
  fixed = math.prod(size for size in given.values() if size != -1)
  if devices % fixed:
    raise errors.CalmError(
      f"config.mesh ({told}) takes a multiple of {fixed} devices and there are {devices}: change "
      f"--config.mesh.{max(given, key=lambda name: given[name])}"
    )
  result = {name: devices // fixed if size == -1 else size for name, size in given.items()}
  if result["data"] % slices:
    raise errors.CalmError(
      f"config.mesh ({told}) has data={result['data']}, but there are {slices} slices, which lie "
      f"along data: give --config.mesh.data={slices} or a multiple"
    )
  return result


def build(settings: config.Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """Returns the mesh over `devices`, by default all there are.

  A mesh smaller than the devices takes the first of them, in a single process only.
  Slices, where devices tell theirs, lie along `data`; all other axes stay inside one.

  Raises:
    CalmError: see `sizes`; and if a mesh of several processes leaves devices out.
  """
  devices = list(jax.devices() if devices is None else devices)
  slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
  shape = sizes(settings, len(devices), slices)
  used = math.prod(shape.values())
  processes = {device.process_index for device in devices}
  if used < len(devices) and len(processes) > 1:
    raise errors.CalmError(
      f"config.mesh has {used} devices, but the {len(processes)} processes have {len(devices)}: "
      "give one axis -1"
    )
  inside = {**shape, "data": shape["data"] // slices}
  if slices > 1:
    across = [slices if name == "data" else 1 for name in AXES]
    laid_out = mesh_utils.create_hybrid_device_mesh(
      list(inside.values()), across, devices, allow_split_physical_axes=True
    )
  else:  # jax.make_mesh refuses sizes for which an axis of the torus would be split.
    laid_out = mesh_utils.create_device_mesh(
      list(inside.values()), devices[:used], allow_split_physical_axes=True
    )
  axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.sharding.Mesh(laid_out, AXES, axis_types=axis_types)


def single() -> jax.sharding.Mesh:
  """Returns the mesh of this process's first device."""
  return build(config.Mesh(fsdp=1), jax.local_devices()[:1])


def current() -> jax.sharding.Mesh:
  """Returns the mesh that is set, else that of this process's first device."""
  mesh = jax.sharding.get_mesh()
  return single() if mesh.empty else mesh


def spec(*axes: str | None) -> PartitionSpec:
  """Returns how an array lies whose axes mean these rows of ALONG."""
  return PartitionSpec(*(ALONG[axis] for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Says how an activation lies on the mesh that is set, if one is; see ALONG."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(*axes))


def examples(function: Callable[..., Any], broadcasts: bool = False) -> Callable[..., Any]:
  """Returns a function of one example as a function of a batch, each device on its own rows.

  What `constrain_last` says inside holds for every example.

  Args:
    broadcasts: whether the function takes any axes in front of an example's. A single device
      is then given the batch whole: mapped over examples, the gradient of a kernel is a
      product for each, added up, which takes a CPU up to five times as long.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if broadcasts and mesh.size <= 1:
    return function
  return jax.vmap(function, spmd_axis_name=None if mesh.empty else ALONG["batch"])


def shards(function: Callable[..., tuple[Any, jax.Array]]) -> Callable[..., tuple[Any, jax.Array]]:
  """Returns a function of one device's positions as one of a batch's, arrays [B, P, ...].

  Of what the function returns, the first is of positions, [n, ...], and comes back as [B, P,
  ...]; the second is summed over devices, once, however it was made.
  """
  mesh = jax.sharding.get_abstract_mesh()
  rows = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
  parts = 1 if mesh.empty else mesh.shape["sequence"]
  mapped = function
  for axis in ("position", "batch"):
    mapped = jax.vmap(mapped, spmd_axis_name=None if mesh.empty else ALONG[axis])

  def whole(*arrays: jax.Array) -> tuple[Any, jax.Array]:
    batch, positions = arrays[0].shape[:2]
    assert batch % rows == 0 and positions % parts == 0, (batch, rows, positions, parts)
    inner = (batch // rows, positions // parts)

    def split(x):
      x = x.reshape(rows, inner[0], parts, inner[1], *x.shape[2:]).swapaxes(1, 2)
      return x.reshape(rows, parts, -1, *x.shape[4:])

    def joined(x):
      x = x.reshape(rows, parts, *inner, *x.shape[3:]).swapaxes(1, 2)
      return x.reshape(batch, positions, *x.shape[4:])

    found, summed = mapped(*map(split, arrays))
    return jax.tree.map(joined, found), jnp.sum(summed, axis=(0, 1))

  return whole


def own_examples(batch: int) -> int:
  """Returns how many examples of a batch each device works on."""
  mesh = jax.sharding.get_abstract_mesh()
  return batch if mesh.empty else -(-batch // (mesh.shape["data"] * mesh.shape["fsdp"]))


def constrain_last(x: jax.Array, *axes: str | None) -> jax.Array:
  """Says how the last axes of one example's activation lie; those before them are whole.

  Without it the partitioner takes over how the parameters lie, and every device works
  on all examples. An axis that the mesh can't divide evenly is whole.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or x.ndim < len(axes):
    return x
  lead = (None,) * (x.ndim - len(axes))
  fitting = (
    axis if axis is None or size % mesh.shape[ALONG[axis]] == 0 else None
    for axis, size in zip(axes, x.shape[len(lead) :], strict=True)
  )
  return jax.lax.with_sharding_constraint(x, spec(*lead, *fitting))


def platform() -> str:
  """Returns that of the mesh's devices, which a program may only be compiled for, or of ours."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (device.platform if device else None) or jax.default_backend()


def rows(x_D: jax.Array) -> jax.Array:
  """Returns activations [..., P, D] as [n, D] on a CPU that does not divide positions, else x.

  Products over one axis of rows are faster there. Elsewhere XLA chooses the layout, and its
  partitioner gathered a whole activation of the head that was made into rows.
  """
  mesh = jax.sharding.get_abstract_mesh()
  whole = mesh.empty or mesh.shape["sequence"] == 1
  return x_D.reshape(-1, x_D.shape[-1]) if whole and platform() == "cpu" else x_D


def row_parts(mesh: jax.sharding.Mesh) -> int:
  """Returns the number of parts that the examples of a batch are divided into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def on_each(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns how an array lies that has a row a device."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def place_on_each(mesh: jax.sharding.Mesh, row: np.ndarray) -> jax.Array:
  """Returns [devices, *row.shape] with this process's row at each of its devices."""
  shape = (mesh.size, *row.shape)
  return jax.make_array_from_callback(shape, on_each(mesh), lambda _: row[None])


def own_rows(mesh: jax.sharding.Mesh, batch: int) -> np.ndarray:
  """Returns the rows of a batch that this process's devices hold, sorted."""
  sharding = NamedSharding(mesh, spec("batch"))
  slices = sharding.addressable_devices_indices_map((batch,)).values()
  return np.unique(np.concatenate([np.arange(batch)[index] for index in slices if index]))


def place_rows(mesh: jax.sharding.Mesh, tree: Any, rows: np.ndarray, batch: int) -> Any:
  """Returns arrays of `batch` rows over the mesh, from the rows of it that this process has."""
  sharding = NamedSharding(mesh, spec("batch"))

  def place(local: np.ndarray) -> jax.Array:
    def part(index):
      wanted = np.arange(batch)[index[0]]
      return local[np.searchsorted(rows, wanted)]

    return jax.make_array_from_callback((batch, *local.shape[1:]), sharding, part)

  return jax.tree.map(place, tree)
