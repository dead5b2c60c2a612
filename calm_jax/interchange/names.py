"""Our parameters <-> the tensors of the reference and of Hugging Face's Llama, by name."""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from calm_jax import config, errors
from calm_jax.interchange import tensors
from calm_jax.models import foreign
from calm_jax.models.heads import registry

# Tensors that hold nothing learned, whatever they are called under.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.\w+|inv_freq|cos_cached|sin_cached)$")


# The autoencoder's one table under the reference's names for it.
AUTOENCODER_TABLE = (
  "encoder.embed_tokens.weight",
  "decoder.lm_head_weight",
  "decoder.lm_head.weight",
)


def autoencoder(sizes: config.Autoencoder, prefix: str = "") -> list[foreign.Tensor]:
  """Returns the tensors of an autoencoder; `prefix` is `ae_model.` inside a language model."""
  name, *also = (f"{prefix}{name}" for name in AUTOENCODER_TABLE)
  found = [foreign.Tensor(name, ("embed/embedding",), also=tuple(also))]
  sides = (
    ("encoder", sizes.encoder_layers, ("token", "patch")),
    ("decoder", sizes.decoder_layers, ("patch", "token")),
  )
  for side, layers, (first, second) in sides:
    half = layers // 2
    for i in range(layers):
      name = f"{prefix}{side}.{side}_layers.{i}"
      path = f"{side}/{first}_block_{i}" if i < half else f"{side}/{second}_block_{i - half}"
      found += foreign.norm(f"{name}.layernorm", f"{path}/norm") + foreign.swiglu(
        f"{name}.mlp", f"{path}/mlp"
      )
    found += foreign.norm(f"{prefix}{side}.norm", f"{side}/norm")
  for name, path in (
    ("encoder.squeeze_layer", "encoder/squeeze"),
    ("encoder.hidden_to_latent", "encoder/posterior"),
    ("decoder.latent_to_hidden", "decoder/from_latent"),
    ("decoder.expand_layer", "decoder/expand"),
  ):
    found += foreign.linear(f"{prefix}{name}", path)
  return found


def _llama(sizes: config.Transformer, name: str, path: str) -> list[foreign.Tensor]:
  found = foreign.norm(f"{name}.norm", f"{path}/norm")
  for i in range(sizes.layers):
    theirs, ours = f"{name}.layers.{i}", f"{path}/layers"
    layer = foreign.norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm")
    layer += foreign.norm(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm")
    layer += foreign.swiglu(f"{theirs}.mlp", f"{ours}/mlp")
    for letter, part in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
      layer += foreign.linear(
        f"{theirs}.self_attn.{letter}_proj", f"{ours}/attention/{part}", bias=False
      )
    found += [dataclasses.replace(tensor, layer=i) for tensor in layer]
  return found


def transformer(sizes: config.Transformer, tied: bool = False) -> list[foreign.Tensor]:
  """Returns the tensors of a LlamaForCausalLM; `tied` where its output layer is its table."""
  table = "model.embed_tokens.weight"
  return [
    foreign.Tensor(table, ("embed/embedding",)),
    foreign.Tensor("lm_head.weight", ("out/kernel",), True, also=(table,) if tied else ()),
    *_llama(sizes, "model", "llama"),
  ]


def _backbone(sizes: config.Backbone) -> list[foreign.Tensor]:
  found = _llama(sizes, "transformer", "backbone/llama")
  if sizes.reads_tokens:
    found.append(foreign.Tensor("transformer.embed_tokens.weight", ("backbone/embed/embedding",)))
    found += foreign.linear("embed_proj.0", "backbone/input/up")
    found += foreign.linear("embed_proj.2", "backbone/input/down")
    found += foreign.norm("embed_proj.3", "backbone/input/norm", bias=True)
  if sizes.reads_latents:
    found += foreign.linear("latent_proj", "backbone/latent_in")
  return found


def calm(sizes: config.Backbone, head: config.Head) -> list[foreign.Tensor]:
  """Returns the tensors of a language model, without its autoencoder's."""
  return _backbone(sizes) + registry.lookup(head).tensors(head)


def check(
  source: Mapping[str, tensors.Stored], expected: list[foreign.Tensor], shapes: Any, folder: Any
) -> dict[foreign.Tensor, list[str]]:
  """Returns the names under which a folder holds each tensor; none is read.

  Args:
    source: the folder's tensors; every one must be expected, or a mere buffer.
    shapes: our abstract parameters.
    folder: named in errors.

  Raises:
    CalmError: for a missing or extra tensor or a wrong shape; the tensor is named.
  """
  ours: Any = traverse_util.flatten_dict(shapes, sep="/")
  known = {name for tensor in expected for name in (tensor.name, *tensor.also)}
  extra = sorted(name for name in source.keys() - known if not _BUFFERS.search(name))
  if extra:
    raise errors.CalmError(
      f"{folder} holds tensors that a model of its config.json has not: {_some(extra)}"
    )
  missing = [t.name for t in expected if not source.keys() & {t.name, *t.also}]
  if missing:
    raise errors.CalmError(f"{folder} lacks tensors: {_some(missing)}")
  chosen = {}
  for tensor in expected:
    chosen[tensor] = [name for name in (tensor.name, *tensor.also) if name in source]
    for name in chosen[tensor]:
      shape = tensor.shape(ours)
      if source[name].shape != shape:
        raise errors.CalmError(
          f"{folder}: tensor {name} has shape {list(source[name].shape)}, a model of its "
          f"config.json has {list(shape)}"
        )
  return chosen


def read(
  source: Mapping[str, tensors.Stored],
  expected: list[foreign.Tensor],
  shapes: Any,
  folder: Any,
  allow_nonfinite: bool = False,
) -> dict[str, Any]:
  """Returns our parameters, float32, from the tensors of a folder.

  Args:
    source, expected, shapes, folder: see `check`.
    allow_nonfinite: take NaN and infinite weights.

  Raises:
    CalmError: as `check`; for two copies of a tied tensor that differ, and for weights
      that are not finite.
  """
  ours: Any = traverse_util.flatten_dict(shapes, sep="/")
  chosen = check(source, expected, shapes, folder)
  flat: dict[str, jax.Array] = {}
  stacked = collections.defaultdict(list)
  for tensor in sorted(chosen, key=lambda tensor: tensor.paths):  # One stack at a time on the host.
    array = _read_one(source, chosen[tensor], folder, allow_nonfinite)
    found = tensor.to_ours(array, ours)
    if tensor.layer is not None:
      (path,) = tensor.paths
      stacked[path].append(found[path])  # Sorting keeps a path's layers in their order.
      layers = len(stacked[path]) == ours[path].shape[0]
      found = {path: np.stack(stacked.pop(path))} if layers else {}
    # On the device at once: beside a tree of host arrays, saving would hold a second one.
    flat |= jax.device_put(found)
  assert flat.keys() == ours.keys(), flat.keys() ^ ours.keys()
  return traverse_util.unflatten_dict(flat, sep="/")


def _read_one(
  source: Mapping[str, tensors.Stored], copies: list[str], folder: Any, allow_nonfinite: bool
) -> np.ndarray:
  first, *others = copies
  array = source[first].read()
  if not allow_nonfinite:
    require_finite(array, first, folder)
  for name in others:
    if not np.array_equal(source[name].read(), array, equal_nan=allow_nonfinite):
      raise errors.CalmError(f"{folder}: {name} and {first} should be equal and are not")
  return array


def require_finite(array: np.ndarray, name: str, folder: Any) -> None:
  """Raises CalmError, naming the tensor, where it holds NaN or infinite values."""
  wrong = array.size - np.count_nonzero(np.isfinite(array))
  if wrong:
    raise errors.CalmError(
      f"{folder}: {wrong} of the {array.size} values of tensor {name} are NaN or infinite; "
      "--allow_nonfinite takes them as they are"
    )


def _some(names: list[str]) -> str:
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def outgoing(params: Any, names: list[foreign.Tensor]) -> list[tensors.Outgoing]:
  """Returns the tensors to write for our parameters."""
  ours: Any = traverse_util.flatten_dict(params, sep="/")
  written = {path for tensor in names for path in tensor.paths}
  assert written == ours.keys(), written ^ ours.keys()
  return [
    tensors.Outgoing(t.name, t.shape(ours), lambda t=t: t.to_theirs(ours))
    for t in sorted(names, key=lambda t: t.name)
  ]
