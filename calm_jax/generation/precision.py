"""Trained weights -> what they are kept as while writing: one row a kind."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import errors, workdir

LanguageModel = workdir.TrainedCalm | workdir.TrainedTransformer

# All that a module is called by while writing.
_METHODS = ("__call__", "condition", "predict", "encode", "decode", "hidden", "logits")


def _cast(params: Any) -> Any:
  return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def _bfloat16(trained: LanguageModel) -> LanguageModel:
  """Half the memory. Where the model computes in bfloat16, the same numbers."""
  if isinstance(trained, workdir.TrainedTransformer):
    return dataclasses.replace(trained, params=_cast(trained.params))
  codec = dataclasses.replace(trained.autoencoder, params=_cast(trained.autoencoder.params))
  return dataclasses.replace(trained, params=_cast(trained.params), autoencoder=codec)


def _qwix() -> Any:
  try:
    import qwix
  except ImportError as error:
    raise errors.CalmError(
      f"--weights=int8 needs qwix ({error}): pip install -e '.[int8]'"
    ) from error
  return qwix


def _quantized(module: nn.Module) -> Any:
  """Returns a module that takes its matrices as int8, a scale for each column; no token tables."""
  qwix = _qwix()
  rule = qwix.QuantizationRule(module_path=r"^(?!.*embed).*$", weight_qtype=jnp.int8)
  methods = [name for name in _METHODS if hasattr(type(module), name)]
  return qwix.quantize_model(module, qwix.PtqProvider([rule]), methods=methods)


def _quantize(params: Any, abstract: Any) -> Any:
  """Returns parameters as a quantized module takes them; those of layers are stacked."""
  qwix = _qwix()
  if "llama" not in params:
    found = qwix.quantize_params(params, abstract)
  else:
    one = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), abstract["llama"]["layers"]
    )
    layers = jax.vmap(lambda layer: qwix.quantize_params(layer, one))(params["llama"]["layers"])

    def others(tree: Any) -> Any:
      return {**tree, "llama": {k: x for k, x in tree["llama"].items() if k != "layers"}}

    found = qwix.quantize_params(others(params), others(abstract))
    found = {**found, "llama": {**found["llama"], "layers": layers}}

  def rest(x: Any) -> Any:
    return x.astype(jnp.bfloat16) if isinstance(x, jax.Array) else x

  return jax.tree.map(
    rest, found, is_leaf=lambda x: isinstance(x, qwix.QArray) or hasattr(x, "how")
  )


def _abstract(init: Callable[[jax.Array], Any]) -> Any:
  return jax.eval_shape(init, jax.random.key(0))


def _int8(trained: LanguageModel) -> LanguageModel:
  """Matrices as int8, all else as bfloat16: a quarter of the memory but for token tables.

  What is drawn changes; see README for by how much on a trained model.

  Raises:
    CalmError: if qwix is not installed.
  """
  if isinstance(trained, workdir.TrainedTransformer):
    module = _quantized(trained.model)
    params = _quantize(trained.params, _abstract(module.initial))
    return dataclasses.replace(trained, model=module, params=params)
  head: Any = copy.copy(trained.model.head)
  head.network = _quantized(head.network)
  model = dataclasses.replace(
    trained.model,
    autoencoder=_quantized(trained.model.autoencoder),
    backbone=_quantized(trained.model.backbone),
    head=head,
  )
  abstract = _abstract(model.init)
  params = {name: _quantize(trained.params[name], abstract[name]) for name in trained.params}
  frozen = _quantize(trained.autoencoder.params, _abstract(model.autoencoder.initial))
  codec = dataclasses.replace(trained.autoencoder, params=frozen)
  return dataclasses.replace(trained, model=model, params=params, autoencoder=codec)


WEIGHTS: dict[str, Callable[[LanguageModel], LanguageModel]] = {
  "float32": lambda trained: trained,
  "bfloat16": _bfloat16,
  "int8": _int8,
}
