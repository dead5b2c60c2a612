"""Our parameters <-> tensors of other frameworks: how one corresponds to the other.

The names follow the CALM reference implementation and Hugging Face's Llama. The tables of
names are in `interchange.names` and, for each head, in the head's own file.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from calm_jax import errors


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of another framework and where its values are in our parameters.

  Attributes:
    name: name of the tensor in the other framework.
    paths: paths in our parameters. With several paths, the other framework stacks our
      arrays along the rows of one tensor.
    transposed: the other framework stores (out, in), as torch's Linear; ours is (in, out).
    also: alternative names; a folder may hold the tensor under any of them, or under several.
    layer: index of the layer, where our array holds all layers stacked.
  """

  name: str
  paths: tuple[str, ...]
  transposed: bool = False
  also: tuple[str, ...] = ()
  layer: int | None = None

  def _shapes(self, ours: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Returns the shape of our part of the tensor at each path."""
    return [ours[path].shape[self.layer is not None :] for path in self.paths]

  def shape(self, ours: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the tensor's shape in the other framework, from our arrays or shapes by path."""
    first, *others = self._shapes(ours)
    joined = (sum(shape[0] for shape in (first, *others)), *first[1:])
    return joined[::-1] if self.transposed else joined

  def to_theirs(self, ours: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the other framework's array."""
    parts = [
      np.asarray(ours[path] if self.layer is None else ours[path][self.layer])
      for path in self.paths
    ]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return joined.T if self.transposed else joined

  def to_ours(self, theirs: np.ndarray, ours: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns our arrays by path, contiguous, of one layer; `ours` supplies their shapes."""
    joined = theirs.T if self.transposed else theirs
    ends = np.cumsum([shape[0] for shape in self._shapes(ours)])[:-1]
    parts = [joined] if len(self.paths) == 1 else np.split(joined, ends)
    return {path: np.ascontiguousarray(part) for path, part in zip(self.paths, parts, strict=True)}


def linear(name: str, path: str, bias: bool = True) -> list[Tensor]:
  """Returns the tensors of a Linear layer."""
  weight = Tensor(f"{name}.weight", (f"{path}/kernel",), transposed=True)
  return [weight, Tensor(f"{name}.bias", (f"{path}/bias",))] if bias else [weight]


def norm(name: str, path: str, bias: bool = False) -> list[Tensor]:
  """Returns the tensors of a normalization layer; LayerNorm has a bias, RMSNorm none."""
  scale = Tensor(f"{name}.weight", (f"{path}/scale",))
  return [scale, Tensor(f"{name}.bias", (f"{path}/bias",))] if bias else [scale]


def swiglu(name: str, path: str) -> list[Tensor]:
  """Returns the tensors of a SwiGLU block."""
  return [
    tensor
    for part in ("gate", "up", "down")
    for tensor in linear(f"{name}.{part}_proj", f"{path}/{part}", bias=False)
  ]


@dataclasses.dataclass(frozen=True)
class Folder:
  """A model's folder of another framework.

  Attributes:
    tensors: tensors by name, whose values are not read yet.
    path: path of the folder, for errors.
    settings: settings in its config.json, see `interchange.config_json.Settings`.
  """

  tensors: Mapping[str, Any]
  path: pathlib.Path
  settings: Any

  def matrix(self, *candidates: str) -> tuple[str, Any]:
    """Returns the first candidate that the folder holds, after its name.

    Raises:
      CalmError: if none is there, or the tensor is not a matrix.
    """
    name = next((name for name in candidates if name in self.tensors), None)
    if name is None:
      raise errors.CalmError(f"{self.path} lacks tensors: {candidates[0]}")
    shape = self.tensors[name].shape
    if len(shape) != 2:
      raise errors.CalmError(
        f"{self.path}: tensor {name} has shape {list(shape)}, it should be a matrix"
      )
    return name, self.tensors[name]

  def count(self, *prefixes: str) -> int:
    """Returns how many layers the folder holds: the numbers that follow one of `prefixes`.

    Raises:
      CalmError: if the numbers have a gap. A number in a name must not make us build more
        layers than there are tensors for.
    """
    pattern = re.compile(rf"(?:{'|'.join(map(re.escape, prefixes))})\.([0-9]+)\.")
    numbers = {match[1] for match in map(pattern.match, self.tensors) if match}
    absent = {str(i) for i in range(len(numbers))} - numbers
    if absent:
      raise errors.CalmError(f"{self.path} lacks tensors: {prefixes[0]}.{min(absent, key=int)}.*")
    return len(numbers)
