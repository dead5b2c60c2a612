"""Our parameters <-> tensors of the reference and of Hugging Face's Llama, by name."""

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

# Tensors without learned values, under any prefix.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.\w+|inv_freq|cos_cached|sin_cached)$")


# Names in the reference of the autoencoder's embedding table, which is shared.
AUTOENCODER_TABLE = (
  "encoder.embed_tokens.weight",
  "decoder.lm_head_weight",
  "decoder.lm_head.weight",
)
# Prefixes of a tempered head's tensors in our module for PyTorch: its network, its embedding.
TEMPERED_PREFIXES = ("tempered_head.", "power_embd.")


def autoencoder(sizes: config.Autoencoder, prefix: str = "") -> list[foreign.Tensor]:
  """Returns the tensors of an autoencoder; `prefix` is `ae_model.` inside a language model."""
  name, *aliases = (f"{prefix}{name}" for name in AUTOENCODER_TABLE)
  result = [foreign.Tensor(name, ("embed/embedding",), also=tuple(aliases))]
  sides = (
    ("encoder", sizes.encoder_layers, ("token", "patch")),
    ("decoder", sizes.decoder_layers, ("patch", "token")),
  )
  for side, layers, (first, second) in sides:
    half = layers // 2
    for i in range(layers):
      name = f"{prefix}{side}.{side}_layers.{i}"
      path = f"{side}/{first}_block_{i}" if i < half else f"{side}/{second}_block_{i - half}"
      result += foreign.norm(f"{name}.layernorm", f"{path}/norm")
      result += foreign.swiglu(f"{name}.mlp", f"{path}/mlp")
    result += foreign.norm(f"{prefix}{side}.norm", f"{side}/norm")
  for name, path in (
    ("encoder.squeeze_layer", "encoder/squeeze"),
    ("encoder.hidden_to_latent", "encoder/posterior"),
    ("decoder.latent_to_hidden", "decoder/from_latent"),
    ("decoder.expand_layer", "decoder/expand"),
  ):
    result += foreign.linear(f"{prefix}{name}", path)
  return result


def _llama(sizes: config.Transformer, name: str, path: str) -> list[foreign.Tensor]:
  """Returns the tensors of a Llama without its table: `name` is its prefix there, `path` ours."""
  result = foreign.norm(f"{name}.norm", f"{path}/norm")
  for i in range(sizes.layers):
    theirs, ours = f"{name}.layers.{i}", f"{path}/layers"
    layer = foreign.norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm")
    layer += foreign.norm(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm")
    layer += foreign.swiglu(f"{theirs}.mlp", f"{ours}/mlp")
    for letter, part in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
      layer += foreign.linear(
        f"{theirs}.self_attn.{letter}_proj", f"{ours}/attention/{part}", bias=False
      )
    result += [dataclasses.replace(tensor, layer=i) for tensor in layer]
  return result


def transformer(sizes: config.Transformer, tied: bool = False) -> list[foreign.Tensor]:
  """Returns the tensors of a LlamaForCausalLM; `tied` if its output layer is its table."""
  table = "model.embed_tokens.weight"
  return [
    foreign.Tensor(table, ("embed/embedding",)),
    foreign.Tensor("lm_head.weight", ("out/kernel",), True, also=(table,) if tied else ()),
    *_llama(sizes, "model", "llama"),
  ]


def _backbone(sizes: config.Backbone) -> list[foreign.Tensor]:
  result = _llama(sizes, "transformer", "backbone/llama")
  if sizes.reads_tokens:
    result.append(foreign.Tensor("transformer.embed_tokens.weight", ("backbone/embed/embedding",)))
    result += foreign.linear("embed_proj.0", "backbone/input/up")
    result += foreign.linear("embed_proj.2", "backbone/input/down")
    result += foreign.norm("embed_proj.3", "backbone/input/norm", bias=True)
  if sizes.reads_latents:
    result += foreign.linear("latent_proj", "backbone/latent_in")
  return result


def calm(sizes: config.Backbone, head: config.Head) -> list[foreign.Tensor]:
  """Returns the tensors of a language model, without its autoencoder's; see `_head`."""
  return _backbone(sizes) + _head(head)


def _head(head: config.Head) -> list[foreign.Tensor]:
  """Returns the tensors of a head; CalmError if the reference has no such head."""
  kind = registry.lookup(head)
  if kind.reference_kind != head.kind:
    raise errors.CalmError(
      f"{head.kind!r} heads have no tensors in the reference: use --format=stablehlo"
    )
  return kind.tensors(head)


def tempered(head: config.Head) -> list[foreign.Tensor]:
  """Returns the tensors of a tempered head in our module for PyTorch; see `_head`."""
  head_prefix, embedding = TEMPERED_PREFIXES
  result = foreign.linear(f"{embedding}mlp.0", "power/power_in")
  result += foreign.linear(f"{embedding}mlp.2", "power/power_out")
  for tensor in _head(head):
    name = tensor.name.partition(".")[2]
    result.append(dataclasses.replace(tensor, name=f"{head_prefix}{name}", also=()))
  return result


def check(
  source: Mapping[str, tensors.Stored], expected: list[foreign.Tensor], shapes: Any, folder: Any
) -> dict[foreign.Tensor, list[str]]:
  """Returns the names under which a folder holds each tensor, without reading the tensors.

  Args:
    source: the folder's tensors; each must be expected, or a buffer without learned values.
    expected: the tensors of the model.
    shapes: our abstract parameters.
    folder: named in errors.

  Raises:
    CalmError: for a missing or extra tensor or a wrong shape; the tensor is named.
  """
  ours: Any = traverse_util.flatten_dict(shapes, sep="/")
  names = {name for tensor in expected for name in (tensor.name, *tensor.also)}
  extra = sorted(name for name in source.keys() - names if not _BUFFERS.search(name))
  if extra:
    raise errors.CalmError(
      f"{folder} holds tensors that a model of its config.json does not have: {_first(extra)}"
    )
  missing = [t.name for t in expected if not source.keys() & {t.name, *t.also}]
  if missing:
    raise errors.CalmError(f"{folder} lacks tensors: {_first(missing)}")
  chosen = {}
  for tensor in expected:
    chosen[tensor] = [name for name in (tensor.name, *tensor.also) if name in source]
    for name in chosen[tensor]:
      shape = tensor.shape(ours)
      if source[name].shape != shape:
        raise errors.CalmError(
          f"{folder}: tensor {name} has shape {list(source[name].shape)}, but a model of its "
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
    allow_nonfinite: accept NaN and infinite weights.

  Raises:
    CalmError: as `check`; if two copies of a tied tensor differ, or weights are not finite.
  """
  ours: Any = traverse_util.flatten_dict(shapes, sep="/")
  chosen = check(source, expected, shapes, folder)
  flat: dict[str, jax.Array] = {}
  stacked = collections.defaultdict(list)
  # Sorted by path, so that the host holds one stack at a time. The sort is stable: a path's
  # layers stay in order.
  for tensor in sorted(chosen, key=lambda tensor: tensor.paths):
    array = _read_copies(source, chosen[tensor], folder, allow_nonfinite)
    arrays = tensor.to_ours(array, ours)
    if tensor.layer is not None:
      (path,) = tensor.paths
      stacked[path].append(arrays[path])
      is_complete = len(stacked[path]) == ours[path].shape[0]
      arrays = {path: np.stack(stacked.pop(path))} if is_complete else {}
    # On the device at once: saving would otherwise hold a second copy on the host.
    flat |= jax.device_put(arrays)
  assert flat.keys() == ours.keys(), flat.keys() ^ ours.keys()
  return traverse_util.unflatten_dict(flat, sep="/")


def _read_copies(
  source: Mapping[str, tensors.Stored], names: list[str], folder: Any, allow_nonfinite: bool
) -> np.ndarray:
  """Returns a tensor that may be stored under several names; CalmError if its copies differ."""
  first, *aliases = names
  array = source[first].read()
  if not allow_nonfinite:
    require_finite(array, first, folder)
  for name in aliases:
    if not np.array_equal(source[name].read(), array, equal_nan=allow_nonfinite):
      raise errors.CalmError(f"{folder}: {name} and {first} should be equal, but they differ")
  return array


def require_finite(array: np.ndarray, name: str, folder: Any) -> None:
  """Raises CalmError, naming the tensor, if it holds NaN or infinite values."""
  num_nonfinite = array.size - np.count_nonzero(np.isfinite(array))
  if num_nonfinite:
    raise errors.CalmError(
      f"{folder}: {num_nonfinite} of the {array.size} values of tensor {name} are NaN or infinite; "
      "--allow_nonfinite accepts them"
    )


def _first(names: list[str]) -> str:
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def outgoing(params: Any, names: list[foreign.Tensor]) -> list[tensors.Outgoing]:
  """Returns the tensors to write for our parameters."""
  ours: Any = traverse_util.flatten_dict(params, sep="/")
  written_paths = {path for tensor in names for path in tensor.paths}
  assert written_paths == ours.keys(), written_paths ^ ours.keys()
  return [
    tensors.Outgoing(t.name, t.shape(ours), lambda t=t: t.to_theirs(ours))
    for t in sorted(names, key=lambda t: t.name)
  ]
