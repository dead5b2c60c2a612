"""Trained weights -> weights in a number format for generation, one row of WEIGHTS per format."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import errors
from calm_jax.training import trained as trained_lib

# The methods of modules that generation calls.
_METHODS = ("__call__", "condition", "predict", "encode", "decode", "hidden", "logits")


def _cast(params: Any) -> Any:
  return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def _bfloat16(trained: trained_lib.Trained) -> trained_lib.Trained:
  """Stores weights as bfloat16: half the memory. Equal results if the model computes in it."""
  parents = {name: _bfloat16(parent) for name, parent in trained.parents.items()}
  return dataclasses.replace(trained, params=_cast(trained.params), parents=parents)


def _qwix() -> Any:
  try:
    import qwix
  except ImportError as error:
    raise errors.CalmError(
      f"--weights=int8 needs qwix ({error}): pip install -e '.[int8]'"
    ) from error
  return qwix


def _quantized(module: nn.Module) -> Any:
  """Returns a module whose matrices are int8 with a scale per column, except embedding tables."""
  qwix = _qwix()
  rule = qwix.QuantizationRule(module_path=r"^(?!.*embed).*$", weight_qtype=jnp.int8)
  methods = [name for name in _METHODS if hasattr(type(module), name)]
  return qwix.quantize_model(module, qwix.PtqProvider([rule]), methods=methods)


def _quantize(params: Any, abstract: Any) -> Any:
  """Returns the parameters of a quantized module; those of layers are stacked."""
  qwix, result, unstacked = _qwix(), {}, {}
  for name, tree in params.items():
    if name == "layers":
      layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), abstract[name])
      result[name] = jax.vmap(lambda x, layer=layer: qwix.quantize_params(x, layer))(tree)
    elif _holds_layers(tree):
      result[name] = _quantize(tree, abstract[name])
    else:
      unstacked[name] = tree
  return result | qwix.quantize_params(unstacked, {name: abstract[name] for name in unstacked})


def _holds_layers(params: Any) -> bool:
  """Returns whether a tree of parameters has stacked layers anywhere."""
  return isinstance(params, dict) and any(
    name == "layers" or _holds_layers(inner) for name, inner in params.items()
  )


def _int8(trained: trained_lib.Trained) -> trained_lib.Trained:
  """Stores matrices as int8 and the rest as bfloat16: a quarter of the memory without embeddings.

  This changes the samples; README states by how much on a trained model.

  Raises:
    CalmError: if qwix is not installed.
  """
  qwix = _qwix()

  def as_bfloat16(x: Any) -> Any:
    return x.astype(jnp.bfloat16) if isinstance(x, jax.Array) else x

  def is_quantized(x: Any) -> bool:
    return isinstance(x, qwix.QArray) or hasattr(x, "how")

  model = trained.model.mapped(_quantized)
  params = _quantize(trained.params, jax.eval_shape(model.initial, jax.random.key(0)))
  return dataclasses.replace(
    trained,
    model=model,
    params=jax.tree.map(as_bfloat16, params, is_leaf=is_quantized),
    parents={name: _int8(parent) for name, parent in trained.parents.items()},
  )


WEIGHTS: dict[str, Callable[[trained_lib.Trained], trained_lib.Trained]] = {
  "float32": lambda trained: trained,
  "bfloat16": _bfloat16,
  "int8": _int8,
}
