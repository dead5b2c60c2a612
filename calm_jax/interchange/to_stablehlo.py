"""A trained stage -> artefacts of jax.export, which run without this package.

Each artefact is a function of the weights and of arrays of any batch size, for CPU, CUDA and
TPU. The weights are stored next to it in safetensors, under our own names.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax import export
from jax import numpy as jnp

from calm_jax import files
from calm_jax.interchange import export as formats
from calm_jax.interchange import tensors
from calm_jax.models import autoencoder, layers, memory
from calm_jax.training import trained as trained_lib

PLATFORMS = ("cpu", "cuda", "tpu")
Shapes = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _Sampling:
  """How next_patch draws the next latents.

  Attributes:
    samples: (weights as a tree, hidden states, noise, *inputs) -> N latents [N, B, Z].
    inputs: name -> shape of the inputs of next_patch after the noise.
    weights: weights beyond those of the language model.
    facts: entries of config.json.
    note: end of the model card.
  """

  samples: Callable[..., jax.Array]
  inputs: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)
  weights: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  note: str = ""


def _abstract(tree: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _write(
  folder: pathlib.Path,
  functions: Mapping[str, tuple[Callable[..., Any], Shapes]],
  weights: Mapping[str, Any],
  facts: dict[str, Any],
) -> None:
  """Writes artefacts, weights and config.json.

  Args:
    functions: name -> (function of (weights, *arrays), shapes of the arrays).
    weights: arrays by flat name.
    facts: contents of config.json.
  """
  for name, (function, shapes) in functions.items():
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(_abstract(weights), *shapes)
    files.write(folder / f"{name}.stablehlo", bytes(exported.serialize()))
  outgoing = [
    tensors.Outgoing(name, x.shape, lambda x=x: np.asarray(x)) for name, x in weights.items()
  ]
  tensors.write_folder(folder, outgoing)
  files.write(folder / "config.json", files.to_json(facts))


def _int(*shape) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def _float(*shape) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _autoencoder_functions(model: autoencoder.Autoencoder, prefix: str) -> dict[str, Any]:
  """Returns encode and decode; `prefix` is the prefix of the autoencoder's weights."""
  sizes, (b,) = model.sizes, export.symbolic_shape("b")

  def params(weights):
    own = {k.removeprefix(prefix): x for k, x in weights.items() if k.startswith(prefix)}
    return traverse_util.unflatten_dict(own, sep="/")

  def encode(weights, token_BK):
    return layers.apply(model, params(weights), token_BK, method="encode")

  def decode(weights, z_BZ):
    return layers.apply(model, params(weights), z_BZ, method="decode")

  return {
    "encode": (encode, (_int(b, sizes.patch_size),)),
    "decode": (decode, (_float(b, sizes.latent),)),
  }


def _tempered(trained: trained_lib.Trained) -> _Sampling:
  """Returns how a tempered head samples; at T = 1 the language model's own head draws."""
  least, model = trained.run.loss.least_temperature, trained.parents["calm"].model

  def tempered(tree, hidden_BD, noise, temperature):
    power_B = jnp.full(hidden_BD.shape[:1], 1 / jnp.maximum(temperature, least))
    condition = trained.model.condition(tree["tempered"], hidden_BD, power_B)
    return trained.model.samples(tree["tempered"], condition, noise)

  def samples(tree, hidden_BD, noise, temperature):
    return jax.lax.cond(
      temperature < 1,
      lambda: tempered(tree, hidden_BD, noise, temperature),
      lambda: model.samples(tree, hidden_BD, noise),
    )

  return _Sampling(
    samples,
    inputs={"temperature": _float()},
    weights={"tempered": trained.params},
    facts={"least_temperature": least},
    note=formats.temperature_note(least),
  )


def _model_functions(
  trained: trained_lib.Trained, sampling: _Sampling, window: int
) -> dict[str, Any]:
  """Returns begin and next_patch of a language model."""
  model, autoencoder_model = trained.model, trained.parents["autoencoder"].model
  size, latent = model.sizes.patch_size, model.sizes.latent
  b, n = export.symbolic_shape("b, n")

  def begin(weights, token_BK):
    """Returns the state before the first patch; the tokens only set the batch size."""
    sizes, dtype = model.backbone.sizes, model.backbone.dtype
    return _to_dicts(memory.Cache.empty(window).allocated(sizes, token_BK.shape[0], dtype))

  def next_patch(weights, state, token_BK, *rest):
    """Reads a patch; returns N candidates for the next one, their latents and the new state."""
    latent_BZ, draw = rest[: len(latents)], rest[len(latents) :]
    tree = traverse_util.unflatten_dict(dict(weights), sep="/")
    latent_B1Z = latent_BZ[0][:, None] if latent_BZ else None
    hidden_B1D, new_cache = model.hidden(tree, token_BK[:, None], latent_B1Z, _cache(state))
    assert isinstance(new_cache, memory.Cache)
    sample_NBZ = sampling.samples(tree, hidden_B1D[:, 0], *draw)
    logits_NBKV = layers.apply(autoencoder_model, tree["autoencoder"], sample_NBZ, method="decode")
    token_NBK = jnp.argmax(logits_NBKV, axis=-1).astype(jnp.int32)
    return token_NBK, sample_NBZ, _to_dicts(new_cache)

  weights = _abstract(_calm_weights(trained, sampling))
  state = jax.eval_shape(begin, weights, _int(b, size))
  latents = (_float(b, latent),) if trained.run.model.reads_latents else ()
  noise = _float(n, b, *model.head.noise_shape)
  return {
    "begin": (begin, (_int(b, size),)),
    "next_patch": (
      next_patch,
      (state, _int(b, size), *latents, noise, *sampling.inputs.values()),
    ),
  }


def _to_dicts(cache: memory.Cache) -> dict[str, Any]:
  """Returns a cache as plain dictionaries, which jax.export can serialise without our classes."""
  assert cache.layers is not None
  state = cache._asdict() | {"layers": cache.layers._asdict()}
  return {name: value for name, value in state.items() if value is not None}


def _cache(state: dict[str, Any]) -> memory.Cache:
  layer_cache = memory.LayerCache(**state["layers"])
  return memory.Cache(layer_cache, state["position_W"], state["next_position"])


def _calm_weights(trained: trained_lib.Trained, sampling: _Sampling) -> dict[str, Any]:
  autoencoder_params = trained.parents["autoencoder"].params
  own = trained.model.drawing(trained.params)
  tree = {**own, "autoencoder": autoencoder_params, **sampling.weights}
  return traverse_util.flatten_dict(tree, sep="/")


def _facts(model: autoencoder.Autoencoder) -> dict[str, Any]:
  return {
    "patch_size": model.sizes.patch_size,
    "latent_size": model.sizes.latent,
    "vocab_size": model.vocab_size,
  }


def write_autoencoder(request: formats.Export) -> str:
  """Writes encode and decode; see `export.Writer`."""
  trained = request.trained
  weights = traverse_util.flatten_dict(trained.params, sep="/")
  functions = _autoencoder_functions(trained.model, "")
  _write(request.folder, functions, weights, _facts(trained.model))
  return f"{_USE}```"


def write_calm(request: formats.Export) -> str:
  """Writes encode, decode, begin and next_patch."""
  return _write_model(request, request.trained, _Sampling(request.trained.model.samples))


def write_tempered(request: formats.Export) -> str:
  """Writes encode, decode, begin, and next_patch, which reads the temperature."""
  return _write_model(request, request.trained.parents["calm"], _tempered(request.trained))


def _write_model(request: formats.Export, trained: trained_lib.Trained, sampling: _Sampling) -> str:
  """Writes a language model that samples as stated; returns the card's section."""
  run = trained.run
  model = trained.parents["autoencoder"].model
  window = run.data.context // model.sizes.patch_size - 1  # Patches before the last in training.
  functions = _autoencoder_functions(model, "autoencoder/")
  functions |= _model_functions(trained, sampling, window)
  facts = {
    **_facts(model),
    "window_patches": window,
    "head": run.head.kind,
    "noise_shape": list(trained.model.head.noise_shape),
    "input": run.model.input,
    **sampling.facts,
  }
  _write(request.folder, functions, _calm_weights(trained, sampling), facts)
  latents = ["mean"] if run.model.reads_latents else []
  arguments = ", ".join(["weights", "state", "tokens", *latents, "noise", *sampling.inputs])
  note = _NOTE.replace("NOISE", trained.model.head.noise_law)
  return _USE + _CALM_CODE.replace("ARGUMENTS", arguments) + note + sampling.note


_USE = """Functions for `jax.export`, for CPU, CUDA and TPU, at any batch size. They run with jax,
flatbuffers and safetensors, without calm_jax:

```python
import pathlib

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file

folder = pathlib.Path("FOLDER")
weights = {}
for file in folder.glob("*.safetensors"):
  weights |= load_file(file)


def load(name):
  return jax.jit(export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes())).call)


encode, decode = load("encode"), load("decode")
mean, log_std = encode(weights, tokens)  # int32 [batch, K] -> [batch, latent]
logits = decode(weights, mean)  # [batch, K, vocabulary]
"""
_CALM_CODE = """
# Reads patch by patch and returns candidates for the next one, one per noise array.
begin, next_patch = load("begin"), load("next_patch")
state = begin(weights, tokens)  # tokens only set the batch size
candidates, latents, state = next_patch(ARGUMENTS)
"""
_NOTE = """```

`noise` is [candidates, batch, *noise_shape], see config.json: NOISE. Candidates are int32
[candidates, batch, K]; they were decoded from the latents [candidates, batch, latent].
JAX guarantees to read such files for six months."""
