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

# Tensors that hold nothing learned, whatever they are called under.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.\w+|inv_freq|cos_cached|sin_cached)$")


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of the other side, and where it lies on ours.

  Attributes:
    name: on the other side. also: other names it may stand under, in place of it or
      besides.
    paths: ours. Of several, theirs is the rows of all, one after the other.
    transposed: theirs is (out, in), a Linear's weight, where ours is (in, out).
    layer: where ours holds those of all layers, stacked, which one theirs is.
  """

  name: str
  paths: tuple[str, ...]
  transposed: bool = False
  also: tuple[str, ...] = ()
  layer: int | None = None

  def _shapes(self, ours: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Returns the shape of our part of it at each path."""
    return [ours[path].shape[self.layer is not None :] for path in self.paths]

  def shape(self, ours: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns its shape on the other side, from arrays or shapes of ours by path."""
    first, *others = self._shapes(ours)
    whole = (sum(shape[0] for shape in (first, *others)), *first[1:])
    return whole[::-1] if self.transposed else whole

  def to_theirs(self, ours: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the other side's array."""
    whole = [
      np.asarray(ours[path] if self.layer is None else ours[path][self.layer])
      for path in self.paths
    ]
    joined = whole[0] if len(whole) == 1 else np.concatenate(whole)
    return joined.T if self.transposed else joined

  def to_ours(self, theirs: np.ndarray, ours: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns our arrays by path, contiguous, a layer's by itself; `ours` tells their shapes."""
    whole = theirs.T if self.transposed else theirs
    ends = np.cumsum([shape[0] for shape in self._shapes(ours)])[:-1]
    parts = [whole] if len(self.paths) == 1 else np.split(whole, ends)
    return {path: np.ascontiguousarray(part) for path, part in zip(self.paths, parts, strict=True)}


def _linear(name: str, path: str, bias: bool = True) -> list[Tensor]:
  weight = Tensor(f"{name}.weight", (f"{path}/kernel",), transposed=True)
  return [weight, Tensor(f"{name}.bias", (f"{path}/bias",))] if bias else [weight]


def _norm(name: str, path: str, bias: bool = False) -> list[Tensor]:
  scale = Tensor(f"{name}.weight", (f"{path}/scale",))
  return [scale, Tensor(f"{name}.bias", (f"{path}/bias",))] if bias else [scale]


def _swiglu(name: str, path: str) -> list[Tensor]:
  return [
    tensor
    for part in ("gate", "up", "down")
    for tensor in _linear(f"{name}.{part}_proj", f"{path}/{part}", bias=False)
  ]


# The autoencoder's one table under the reference's names for it.
AUTOENCODER_TABLE = (
  "encoder.embed_tokens.weight",
  "decoder.lm_head_weight",
  "decoder.lm_head.weight",
)


def autoencoder(sizes: config.Autoencoder, prefix: str = "") -> list[Tensor]:
  """Returns the tensors of an autoencoder; `prefix` is `ae_model.` inside a language model."""
  name, *also = (f"{prefix}{name}" for name in AUTOENCODER_TABLE)
  found = [Tensor(name, ("embed/embedding",), also=tuple(also))]
  sides = (
    ("encoder", sizes.encoder_layers, ("token", "patch")),
    ("decoder", sizes.decoder_layers, ("patch", "token")),
  )
  for side, layers, (first, second) in sides:
    half = layers // 2
    for i in range(layers):
      name = f"{prefix}{side}.{side}_layers.{i}"
      path = f"{side}/{first}_block_{i}" if i < half else f"{side}/{second}_block_{i - half}"
      found += _norm(f"{name}.layernorm", f"{path}/norm") + _swiglu(f"{name}.mlp", f"{path}/mlp")
    found += _norm(f"{prefix}{side}.norm", f"{side}/norm")
  for name, path in (
    ("encoder.squeeze_layer", "encoder/squeeze"),
    ("encoder.hidden_to_latent", "encoder/posterior"),
    ("decoder.latent_to_hidden", "decoder/from_latent"),
    ("decoder.expand_layer", "decoder/expand"),
  ):
    found += _linear(f"{prefix}{name}", path)
  return found


def _llama(sizes: config.Transformer, name: str, path: str) -> list[Tensor]:
  found = _norm(f"{name}.norm", f"{path}/norm")
  for i in range(sizes.layers):
    theirs, ours = f"{name}.layers.{i}", f"{path}/layers"
    layer = _norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm")
    layer += _norm(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm")
    layer += _swiglu(f"{theirs}.mlp", f"{ours}/mlp")
    for letter, part in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
      layer += _linear(f"{theirs}.self_attn.{letter}_proj", f"{ours}/attention/{part}", bias=False)
    found += [dataclasses.replace(tensor, layer=i) for tensor in layer]
  return found


def transformer(sizes: config.Transformer, tied: bool = False) -> list[Tensor]:
  """Returns the tensors of a LlamaForCausalLM; `tied` where its output layer is its table."""
  table = "model.embed_tokens.weight"
  return [
    Tensor(table, ("embed/embedding",)),
    Tensor("lm_head.weight", ("out/kernel",), True, also=(table,) if tied else ()),
    *_llama(sizes, "model", "llama"),
  ]


def _backbone(sizes: config.Backbone) -> list[Tensor]:
  found = _llama(sizes, "transformer", "backbone/llama")
  if sizes.reads_tokens:
    found.append(Tensor("transformer.embed_tokens.weight", ("backbone/embed/embedding",)))
    found += _linear("embed_proj.0", "backbone/input/up")
    found += _linear("embed_proj.2", "backbone/input/down")
    found += _norm("embed_proj.3", "backbone/input/norm", bias=True)
  if sizes.reads_latents:
    found += _linear("latent_proj", "backbone/latent_in")
  return found


def _energy_head(sizes: config.Head) -> list[Tensor]:
  name = "generative_head"
  found = _linear(f"{name}.noise_embd", "head/noise_in")
  found += _linear(f"{name}.hidden_embd", "head/hidden_in")
  found += _norm(f"{name}.norm_noise", "head/noise_norm", bias=True)
  found += _norm(f"{name}.norm_hidden", "head/hidden_norm", bias=True)
  for i in range(sizes.blocks):
    block, path = f"{name}.mlp_blocks.{i}", f"head/block_{i}"
    halves = (f"{path}/sample_in/kernel", f"{path}/hidden_in/kernel")
    found += _norm(f"{block}.in_ln", f"{path}/norm", bias=True)
    found += [
      Tensor(f"{block}.linears.0.weight", halves, transposed=True),
      Tensor(f"{block}.linears.0.bias", (f"{path}/hidden_in/bias",)),
    ]
    found += _linear(f"{block}.linears.2", f"{path}/middle")
    found += _linear(f"{block}.linears.4", f"{path}/gate_up")
    found += _linear(f"{block}.down_proj", f"{path}/down")
  found += _norm(f"{name}.final_layer.in_ln", "head/norm", bias=True)
  found += _linear(f"{name}.final_layer.linears.0", "head/middle")
  found += _linear(f"{name}.final_layer.linears.2", "head/out")
  return [
    dataclasses.replace(t, also=(t.name.replace("generative_head", "mlp_generator"),))
    for t in found
  ]


def _denoiser(sizes: config.Head) -> list[Tensor]:
  name = "generative_head.net"
  found = _linear(f"{name}.cond_embed", "head/hidden_in")
  found += _linear(f"{name}.input_proj", "head/latent_in")
  found += _linear(f"{name}.time_embed.mlp.0", "head/time_in")
  found += _linear(f"{name}.time_embed.mlp.2", "head/time_out")
  for i in range(sizes.blocks):
    block, path = f"{name}.res_blocks.{i}", f"head/block_{i}"
    found += _norm(f"{block}.in_ln", f"{path}/norm", bias=True)
    found += _linear(f"{block}.adaLN_modulation.1", f"{path}/modulation")
    found += _linear(f"{block}.mlp.0", f"{path}/up") + _linear(f"{block}.mlp.2", f"{path}/down")
  found += _linear(f"{name}.final_layer.adaLN_modulation.1", "head/modulation")
  return found + _linear(f"{name}.final_layer.linear", "head/out")


_HEADS = {"energy": _energy_head, "flow": _denoiser, "diffusion": _denoiser}


def calm(sizes: config.Backbone, head: config.Head) -> list[Tensor]:
  """Returns the tensors of a language model, without its autoencoder's."""
  return _backbone(sizes) + _HEADS[head.kind](head)


def check(
  source: Mapping[str, tensors.Stored], expected: list[Tensor], shapes: Any, folder: Any
) -> dict[Tensor, list[str]]:
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
  expected: list[Tensor],
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


def outgoing(params: Any, names: list[Tensor]) -> list[tensors.Outgoing]:
  """Returns the tensors to write for our parameters."""
  ours: Any = traverse_util.flatten_dict(params, sep="/")
  written = {path for tensor in names for path in tensor.paths}
  assert written == ours.keys(), written ^ ours.keys()
  return [
    tensors.Outgoing(t.name, t.shape(ours), lambda t=t: t.to_theirs(ours))
    for t in sorted(names, key=lambda t: t.name)
  ]
