"""Folders of the reference or of a Llama -> our settings and parameters."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from calm_jax import config, errors
from calm_jax.interchange import checksums, names, tensors
from calm_jax.interchange.config_json import Settings
from calm_jax.models import autoencoder, calm, foreign, transformer
from calm_jax.models.heads import head as head_lib
from calm_jax.models.heads import registry, tempered

Params = Any
# `names.read`, which returns the parameters, or `names.check`, which returns the tensors' names.
ReadTensors = Callable[..., Any]

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# Patterns of the files that are read here.
USED = ("config.json", *TOKENIZERS, "*.safetensors", "*.bin", "*.index.json")
AUTOENCODER_PREFIX = "ae_model."


@dataclasses.dataclass(frozen=True)
class Imported:
  """A model read from a folder.

  Attributes:
    stage: its stage.
    settings: groups of its settings by name, as settings or as mappings; those of training are
      unknown and keep the published values.
    vocab_size: rows of its token table.
    params: its parameters; see `ReadTensors`.
    eos_id: EOS of config.json, which often differs from the tokenizer's.
    parents: the models that it is used with, by name: the autoencoder of stage two, and the
      language model of a tempered head.
  """

  stage: str
  settings: Mapping[str, Any]
  vocab_size: int
  params: Params
  eos_id: int | None = None
  parents: Mapping[str, "Imported"] = dataclasses.field(default_factory=dict)

  @property
  def sizes(self) -> Any:
    """The sizes of the model."""
    return self.settings["model"]


def _open(path: pathlib.Path) -> foreign.Folder:
  return foreign.Folder(tensors.open_folder(path), path, Settings(path))


def _table(folder: foreign.Folder, prefix: str) -> tuple[str, tensors.Stored]:
  """Returns the name and the tensor of the autoencoder's token table, which has several names."""
  return folder.matrix(*(f"{prefix}{name}" for name in names.AUTOENCODER_TABLE))


def _autoencoder(folder: foreign.Folder, prefix: str, read_tensors: ReadTensors) -> Imported:
  """Returns the autoencoder whose tensors' names begin with `prefix`; shapes give its sizes."""

  def columns(name: str) -> int:
    return folder.matrix(f"{prefix}{name}.weight")[1].shape[1]

  vocab_size, width = _table(folder, prefix)[1].shape
  try:
    sizes = config.Autoencoder(
      patch_size=columns("encoder.squeeze_layer") // width,
      width=width,
      ffn=columns("encoder.encoder_layers.0.mlp.down_proj"),
      latent=columns("decoder.latent_to_hidden"),
      encoder_layers=folder.count(f"{prefix}encoder.encoder_layers"),
      decoder_layers=folder.count(f"{prefix}decoder.decoder_layers"),
    )
  except errors.CalmError as error:
    raise errors.CalmError(
      f"the autoencoder in {folder.path} has impossible sizes: {error}"
    ) from error
  shapes = jax.eval_shape(autoencoder.Autoencoder(sizes, vocab_size).initial, jax.random.key(0))
  own = {name: stored for name, stored in folder.tensors.items() if name.startswith(prefix)}
  params = read_tensors(own, names.autoencoder(sizes, prefix), shapes, folder.path)
  groups = {
    "data": config.Data(context=2048 * sizes.patch_size),
    "model": sizes,
    "training": config.Training(compute_dtype=folder.settings.dtype),
  }
  return Imported("autoencoder", groups, vocab_size, params)


def _read_autoencoder(folder: foreign.Folder, read_tensors: ReadTensors) -> Imported:
  """Returns the autoencoder in its own folder."""
  imported, settings = _autoencoder(folder, "", read_tensors), folder.settings
  settings.vocab_size(*_table(folder, ""))
  sizes = imported.sizes
  settings.require(
    patch_size=sizes.patch_size,
    hidden_size=sizes.width,
    intermediate_size=sizes.ffn,
    latent_size=sizes.latent,
    num_encoder_layers=sizes.encoder_layers,
    num_decoder_layers=sizes.decoder_layers,
  )
  return dataclasses.replace(imported, eos_id=settings.eos_id)


def _has_config(folder: pathlib.Path) -> bool:
  """Returns whether a folder can be read and holds a config.json."""
  try:
    return (folder / "config.json").exists()
  except (OSError, ValueError):  # The path of another machine may be forbidden or invalid here.
    return False


def _find_autoencoder(folder: foreign.Folder, override: str, read_tensors: ReadTensors) -> Imported:
  """Returns a language model's autoencoder.

  It is read from the folder `override` if that is not empty, else from the model's own folder,
  else from the folder that its `ae_path` names.
  """
  has_own = any(name.startswith(AUTOENCODER_PREFIX) for name in folder.tensors)
  own = _autoencoder(folder, AUTOENCODER_PREFIX, read_tensors) if has_own else None
  if own and not override:
    return own
  path = folder.settings.text("ae_path")
  ae_paths = [folder.path / path, pathlib.Path(path)] if path else []
  candidates = [pathlib.Path(override)] if override else ae_paths
  ae_folder = next((candidate for candidate in candidates if _has_config(candidate)), None)
  if ae_folder is None:
    raise errors.CalmError(
      f"--autoencoder={override} is not a folder with a config.json"
      if override
      else f"{folder.path} holds no autoencoder, and its ae_path {config.shown(path)} does not "
      "exist: give --autoencoder=DIR"
    )
  checksums.check(ae_folder, USED)
  loaded = _read_autoencoder(_open(ae_folder), read_tensors)
  if own and not _equal(own, loaded):
    raise errors.CalmError(
      f"{folder.path} holds an autoencoder of its own, which differs from the one in {ae_folder}: "
      "leave out --autoencoder"
    )
  return loaded


def _equal(a: Imported, b: Imported) -> bool:
  """Returns whether two models have the same sizes and parameters."""
  same_sizes = a.sizes == b.sizes and a.vocab_size == b.vocab_size
  return same_sizes and all(
    np.array_equal(x, y, equal_nan=True)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
  )


def _head(folder: foreign.Folder, latent: int) -> config.Head:
  """Returns the head by its tensors' names, whatever config.json calls the model."""
  for kind, head in registry.HEADS.items():
    sizes = head.recognize(folder, latent)
    if sizes is not None:
      return config.Head(kind=kind, **sizes)
  nearest = min((name for name in folder.tensors if "head" in name), default="none")
  raise errors.CalmError(
    f"{folder.path} holds no known head ({', '.join(registry.HEADS)}); the tensor most like one is "
    f"{nearest}"
  )


def _transformer(folder: foreign.Folder, prefix: str) -> dict[str, Any]:
  """Returns the sizes of the Llama layers, whose tensors' names begin with `prefix`."""
  settings = folder.settings
  heads = settings.whole("num_attention_heads")
  ffn, width = folder.matrix(f"{prefix}.layers.0.mlp.gate_proj.weight")[1].shape
  layers = folder.count(f"{prefix}.layers")
  settings.require(
    num_hidden_layers=layers, hidden_size=width, intermediate_size=ffn, head_dim=width // heads
  )
  return {
    "layers": layers,
    "width": width,
    "ffn": ffn,
    "heads": heads,
    "kv_heads": settings.whole("num_key_value_heads", heads),
    "rope_theta": float(settings.number("rope_theta", 10000.0)),
  }


def _read_calm(
  folder: foreign.Folder, autoencoder_folder: str, read_tensors: ReadTensors
) -> Imported:
  """Returns the CALM language model in a folder."""
  inner, settings = _find_autoencoder(folder, autoencoder_folder, read_tensors), folder.settings
  sizes = inner.sizes
  settings.require(patch_size=sizes.patch_size, latent_size=sizes.latent)
  reads_tokens = "transformer.embed_tokens.weight" in folder.tensors
  reads_latents = "latent_proj.weight" in folder.tensors
  backbone = config.Backbone(
    **_transformer(folder, "transformer"),
    patch_size=sizes.patch_size,
    input="discrete" if not reads_latents else "both" if reads_tokens else "continuous",
  )
  head = _head(folder, sizes.latent)
  samples, alpha = settings.whole("num_samples", 8), float(settings.number("beta", 1.0))
  groups = {
    "data": config.Data(context=settings.context(sizes.patch_size)),
    "model": backbone,
    "head": head,
    "loss": config.CalmLoss(samples=samples, alpha=alpha),
    "training": config.Training(compute_dtype=settings.dtype),
  }
  vocab_size = inner.vocab_size
  if reads_tokens:
    name = "transformer.embed_tokens.weight"
    vocab_size = settings.vocab_size(*folder.matrix(name))
    if vocab_size < inner.vocab_size:
      raise errors.CalmError(
        f"{folder.path}: {name} has {vocab_size} rows, too few for the {inner.vocab_size} tokens "
        "of the autoencoder"
      )
  model = calm.Calm.build(backbone, head, sizes, vocab_size)
  others = (AUTOENCODER_PREFIX, *names.TEMPERED_PREFIXES)
  own = {name: x for name, x in folder.tensors.items() if not name.startswith(others)}
  shapes = jax.eval_shape(model.initial, jax.random.key(0))
  params = read_tensors(own, names.calm(backbone, head), shapes, folder.path)
  parents = {"autoencoder": inner}
  language_model = Imported("calm", groups, vocab_size, params, settings.eos_id, parents)
  return _with_tempered_head(language_model, model.head, folder, read_tensors)


def _with_tempered_head(
  language_model: Imported, head: head_lib.Head, folder: foreign.Folder, read_tensors: ReadTensors
) -> Imported:
  """Returns the tempered head in the folder of a language model; without one, the latter."""
  prefixes = names.TEMPERED_PREFIXES
  own = {name: stored for name, stored in folder.tensors.items() if name.startswith(prefixes)}
  if not own:
    return language_model
  groups, sizes = language_model.settings, language_model.sizes
  trunk = head_lib.Trunk(
    sizes.width, language_model.parents["autoencoder"].sizes.latent, sizes.init
  )
  shapes = jax.eval_shape(tempered.Tempered(head, trunk).initial, jax.random.key(0))
  params = read_tensors(own, names.tempered(groups["head"]), shapes, folder.path)
  least = folder.settings.number("least_temperature")
  return dataclasses.replace(
    language_model,
    stage="tempered",
    settings={**groups, "loss": {"least_temperature": float(least)}},
    params=params,
    parents={"calm": language_model},
  )


def _read_llama(folder: foreign.Folder, read_tensors: ReadTensors) -> Imported:
  """Returns the Llama in a folder."""
  settings = folder.settings
  kind = settings.text("model_type")
  if kind not in ("", "llama"):
    raise errors.CalmError(
      f"{folder.path} holds a model of type {kind!r}, whose layers may differ from Llama's: only "
      "'llama' can be converted"
    )
  sizes = config.Transformer(**_transformer(folder, "model"))
  groups = {
    "data": config.Data(context=settings.context()),
    "model": sizes,
    "training": config.Training(batch=1024, compute_dtype=settings.dtype),
  }
  name = "model.embed_tokens.weight"
  vocab_size = settings.vocab_size(*folder.matrix(name))
  model = transformer.Transformer(sizes, vocab_size)
  shapes = jax.eval_shape(model.initial, jax.random.key(0))
  expected = names.transformer(sizes, settings.tied)
  params = read_tensors(folder.tensors, expected, shapes, folder.path)
  return Imported("transformer", groups, vocab_size, params, settings.eos_id)


def read(
  folder: pathlib.Path, autoencoder_folder: str = "", allow_nonfinite: bool = False
) -> Imported:
  """Returns the model in a folder of the reference, of our PyTorch export, or of a plain Llama.

  The kind of model is inferred from the names of its tensors.

  Args:
    folder: the folder.
    autoencoder_folder: folder of a language model's autoencoder; by default the autoencoder in
      `folder`, else the one that its `ae_path` names.
    allow_nonfinite: accept NaN and infinite weights.

  Raises:
    CalmError: if the folder holds none of these models, a file differs from its checksum, or
      config.json contradicts the weights; see also `names.read`.
  """
  checksums.check(folder, USED)
  read_tensors = functools.partial(names.read, allow_nonfinite=allow_nonfinite)
  return _read_and_name(folder, autoencoder_folder, read_tensors)


def check(folder: pathlib.Path) -> Imported:
  """Returns the model in a folder like `read`, but checks only the names and shapes of weights.

  Its `params` are the names of its tensors. Checksums are ignored.

  Raises:
    CalmError: see `read`; errors that need the values of weights are not found.
  """
  return _read_and_name(folder, "", names.check)


def _read_and_name(
  folder: pathlib.Path, autoencoder_folder: str, read_tensors: ReadTensors
) -> Imported:
  """Returns the result of `_read`; adds the folder's path to errors that lack it."""
  try:
    return _read(folder, autoencoder_folder, read_tensors)
  except errors.CalmError as error:
    if str(folder) in str(error):
      raise
    raise errors.CalmError(f"{folder / 'config.json'}: {error}") from error
  except OSError as error:  # For lack of permission, for example.
    raise errors.CalmError(f"can't read {folder}: {error}") from error


def _read(path: pathlib.Path, autoencoder_folder: str, read_tensors: ReadTensors) -> Imported:
  """Returns the model in a folder; the names of its tensors decide how it is read."""
  folder = _open(path)
  is_calm = any(name.startswith("transformer.") for name in folder.tensors)
  if autoencoder_folder and not is_calm:
    raise errors.CalmError(
      f"--autoencoder={autoencoder_folder} is for a CALM language model, and {path} holds none"
    )
  if is_calm:
    return _read_calm(folder, autoencoder_folder, read_tensors)
  if any(name.startswith("model.layers.") for name in folder.tensors):
    return _read_llama(folder, read_tensors)
  if any(name.startswith("encoder.") for name in folder.tensors):
    return _read_autoencoder(folder, read_tensors)
  raise errors.CalmError(
    f"{path} holds no known model: neither a CALM language model nor its autoencoder nor a "
    f"LlamaForCausalLM; one of its tensors is {min(folder.tensors, default='(none)')}"
  )
