"""Folders of the reference -> our settings and parameters."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from calm_jax import config, errors
from calm_jax.interchange import checksums, names, tensors
from calm_jax.interchange.config_json import Settings
from calm_jax.models import autoencoder, calm, transformer

Params = Any
Source = Mapping[str, tensors.Stored]
# What is made of the tensors once the model is known: `names.read`, or `names.check` alone.
Take = Callable[..., Any]

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# Patterns of the files that are read here.
USED = ("config.json", *TOKENIZERS, "*.safetensors", "*.bin", "*.index.json")
AUTOENCODER_PREFIX = "ae_model."


@dataclasses.dataclass(frozen=True)
class Imported:
  """A model read from a folder, nothing written yet.

  Attributes:
    run: its settings; those of training are not known and stay the published ones.
    vocab_size: rows of its token table.
    eos_id: what config.json says, which is often not the tokenizer's.
    autoencoder: stage two's.
  """

  run: config.Run
  vocab_size: int
  params: Params
  eos_id: int | None = None
  autoencoder: "Imported | None" = None


def _matrix(source: Source, folder: pathlib.Path, *candidates: str) -> tuple[str, tensors.Stored]:
  """Returns the first of these tensors that is there; CalmError if none is, or it is no matrix."""
  name = next((name for name in candidates if name in source), None)
  if name is None:
    raise errors.CalmError(f"{folder} lacks tensors: {candidates[0]}")
  if len(source[name].shape) != 2:
    raise errors.CalmError(
      f"{folder}: tensor {name} has shape {list(source[name].shape)}, it should be a matrix"
    )
  return name, source[name]


def _count(source: Source, folder: pathlib.Path, *prefixes: str) -> int:
  """Returns how many numbers follow one of `prefixes` in names: 0, 1, 2 and so on, no gaps.

  Raises:
    CalmError: for a gap: what config.json or a name says must not make us build more
      layers than there are tensors for.
  """
  pattern = re.compile(rf"(?:{'|'.join(map(re.escape, prefixes))})\.([0-9]+)\.")
  found = {match[1] for match in map(pattern.match, source) if match}
  absent = {str(i) for i in range(len(found))} - found
  if absent:
    raise errors.CalmError(f"{folder} lacks tensors: {prefixes[0]}.{min(absent, key=int)}.*")
  return len(found)


def _table(source: Source, folder: pathlib.Path, prefix: str) -> tuple[str, tensors.Stored]:
  """Returns the autoencoder's token table, under whichever name it is there."""
  return _matrix(source, folder, *(f"{prefix}{name}" for name in names.AUTOENCODER_TABLE))


def _autoencoder(
  source: Source, prefix: str, folder: pathlib.Path, dtype: Any, take: Take
) -> Imported:
  """Returns an autoencoder whose sizes are read off its tensors' shapes."""

  def columns(name: str) -> int:
    return _matrix(source, folder, f"{prefix}{name}.weight")[1].shape[1]

  vocab_size, width = _table(source, folder, prefix)[1].shape
  try:
    sizes = config.Autoencoder(
      patch_size=columns("encoder.squeeze_layer") // width,
      width=width,
      ffn=columns("encoder.encoder_layers.0.mlp.down_proj"),
      latent=columns("decoder.latent_to_hidden"),
      encoder_layers=_count(source, folder, f"{prefix}encoder.encoder_layers"),
      decoder_layers=_count(source, folder, f"{prefix}decoder.decoder_layers"),
    )
  except errors.CalmError as error:
    raise errors.CalmError(f"the autoencoder in {folder} can't be: {error}") from error
  shapes = jax.eval_shape(autoencoder.Autoencoder(sizes, vocab_size).initial, jax.random.key(0))
  own = {name: stored for name, stored in source.items() if name.startswith(prefix)}
  params = take(own, names.autoencoder(sizes, prefix), shapes, folder)
  run = config.AutoencoderRun(
    data=config.Data(context=2048 * sizes.patch_size),
    model=sizes,
    training=config.Training(compute_dtype=dtype),
  )
  return Imported(run, vocab_size, params)


def _read_autoencoder(
  folder: pathlib.Path, source: Source, settings: Settings, take: Take
) -> Imported:
  imported = _autoencoder(source, "", folder, settings.dtype, take)
  settings.vocab_size(*_table(source, folder, ""))
  sizes = imported.run.model
  assert isinstance(sizes, config.Autoencoder)
  settings.require(
    patch_size=sizes.patch_size,
    hidden_size=sizes.width,
    intermediate_size=sizes.ffn,
    latent_size=sizes.latent,
    num_encoder_layers=sizes.encoder_layers,
    num_decoder_layers=sizes.decoder_layers,
  )
  return dataclasses.replace(imported, eos_id=settings.eos_id)


def _has_config(place: pathlib.Path) -> bool:
  """Tells whether a folder can be read and holds a config.json."""
  try:
    return (place / "config.json").exists()
  except (OSError, ValueError):  # Another machine's path may be closed to us, or none here.
    return False


def _find_autoencoder(
  folder: pathlib.Path, source: Source, settings: Settings, given: str, take: Take
) -> Imported:
  """Returns a language model's autoencoder: the given one, its own, or the one ae_path names."""
  inside = any(name.startswith(AUTOENCODER_PREFIX) for name in source)
  own = _autoencoder(source, AUTOENCODER_PREFIX, folder, settings.dtype, take) if inside else None
  if own and not given:
    return own
  path = settings.text("ae_path")
  places = [pathlib.Path(given)] if given else [folder / path, pathlib.Path(path)] if path else []
  place = next((place for place in places if _has_config(place)), None)
  if place is None:
    raise errors.CalmError(
      f"--autoencoder={given} is no folder with a config.json"
      if given
      else f"{folder} holds no autoencoder, and its ae_path {config.shown(path)} leads nowhere: "
      "give --autoencoder=DIR"
    )
  checksums.check(place, USED)
  found = _read_autoencoder(place, tensors.open_folder(place), Settings(place), take)
  if own and not _equal(own, found):
    raise errors.CalmError(
      f"{folder} holds an autoencoder of its own, which is not the one in {place}: leave out "
      "--autoencoder"
    )
  return found


def _equal(a: Imported, b: Imported) -> bool:
  same_sizes = a.run.model == b.run.model and a.vocab_size == b.vocab_size
  return same_sizes and all(
    np.array_equal(x, y, equal_nan=True)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
  )


def _head(source: Source, folder: pathlib.Path, settings: Settings, latent: int) -> config.Head:
  """Returns the head that the tensors' names tell, whatever config.json calls the model."""
  steps = settings.whole("sampling_steps", 0) if settings.has("sampling_steps") else 0
  energy = ("generative_head", "mlp_generator")
  if any(name.startswith(("generative_head.mlp_blocks.", "mlp_generator.")) for name in source):
    blocks = _count(source, folder, *(f"{name}.mlp_blocks" for name in energy))
    inputs = (f"{name}.noise_embd.weight" for name in energy)
    noise = _matrix(source, folder, *inputs)[1].shape[1]
    settings.require(num_mlp_layers=blocks, noise_size=noise)
    return config.Head(kind="energy", blocks=blocks, noise=noise)
  out = "generative_head.net.final_layer.linear.weight"
  if out in source:
    rows = _matrix(source, folder, out)[1].shape[0]
    kinds = {latent: "flow", 2 * latent: "diffusion"}
    if rows in kinds:
      blocks = _count(source, folder, "generative_head.net.res_blocks")
      settings.require(num_mlp_layers=blocks)
      return config.Head(kind=kinds[rows], blocks=blocks, steps=steps)
  found = sorted(name for name in source if "head" in name)
  raise errors.CalmError(
    f"{folder} holds no head that is known (energy, flow, diffusion); of its tensors, "
    f"{found[0] if found else 'none'} comes nearest"
  )


def _transformer(
  source: Source, folder: pathlib.Path, settings: Settings, prefix: str
) -> dict[str, Any]:
  """Returns the sizes of the Llama layers, whose tensors' names begin with `prefix`."""
  heads = settings.whole("num_attention_heads")
  ffn, width = _matrix(source, folder, f"{prefix}.layers.0.mlp.gate_proj.weight")[1].shape
  layers = _count(source, folder, f"{prefix}.layers")
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
  folder: pathlib.Path, source: Source, settings: Settings, given: str, take: Take
) -> Imported:
  codec = _find_autoencoder(folder, source, settings, given, take)
  sizes = codec.run.model
  assert isinstance(sizes, config.Autoencoder)
  settings.require(patch_size=sizes.patch_size, latent_size=sizes.latent)
  reads_tokens = "transformer.embed_tokens.weight" in source
  reads_latents = "latent_proj.weight" in source
  run = config.CalmRun(
    data=config.Data(context=settings.context(sizes.patch_size)),
    model=config.Backbone(
      **_transformer(source, folder, settings, "transformer"),
      patch_size=sizes.patch_size,
      input="discrete" if not reads_latents else "both" if reads_tokens else "continuous",
    ),
    head=_head(source, folder, settings, sizes.latent),
    loss=config.CalmLoss(
      samples=settings.whole("num_samples", 8), alpha=float(settings.number("beta", 1.0))
    ),
    training=config.Training(compute_dtype=settings.dtype),
  )
  vocab_size = codec.vocab_size
  if reads_tokens:
    name = "transformer.embed_tokens.weight"
    vocab_size = settings.vocab_size(*_matrix(source, folder, name))
    if vocab_size < codec.vocab_size:
      raise errors.CalmError(
        f"{folder}: {name} has {vocab_size} rows, too few for the {codec.vocab_size} tokens that "
        "the autoencoder writes"
      )
  module = autoencoder.Autoencoder(sizes, codec.vocab_size)
  model = calm.Calm.build(run, module, vocab_size)
  own = {name: x for name, x in source.items() if not name.startswith(AUTOENCODER_PREFIX)}
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  params = take(own, names.calm(run.model, run.head), shapes, folder)
  return Imported(run, vocab_size, params, settings.eos_id, codec)


def _read_llama(folder: pathlib.Path, source: Source, settings: Settings, take: Take) -> Imported:
  kind = settings.text("model_type")
  if kind not in ("", "llama"):
    raise errors.CalmError(
      f"{folder} holds a model of type {kind!r}, whose layers may do what Llama's do not: only "
      "'llama' can be converted"
    )
  run = config.TransformerRun(
    data=config.Data(context=settings.context()),
    model=config.Transformer(**_transformer(source, folder, settings, "model")),
    training=config.Training(batch=1024, compute_dtype=settings.dtype),
  )
  name = "model.embed_tokens.weight"
  vocab_size = settings.vocab_size(*_matrix(source, folder, name))
  model = transformer.Transformer(run.model, vocab_size)
  shapes = jax.eval_shape(model.initial, jax.random.key(0))
  expected = names.transformer(run.model, settings.tied)
  params = take(source, expected, shapes, folder)
  return Imported(run, vocab_size, params, settings.eos_id)


def read(
  folder: pathlib.Path, given_autoencoder: str = "", allow_nonfinite: bool = False
) -> Imported:
  """Returns the model in a folder of the reference, of ours for PyTorch, or of a plain Llama.

  What it is, is told from its tensors' names.

  Args:
    given_autoencoder: folder of the autoencoder of a language model; by default that in
      the model's own folder, then the one that its `ae_path` names.
    allow_nonfinite: take NaN and infinite weights.

  Raises:
    CalmError: for a folder that is no model of these, files that are not what its
      checksums say, a config.json that contradicts the weights, and as `names.read` does.
  """
  checksums.check(folder, USED)
  take = functools.partial(names.read, allow_nonfinite=allow_nonfinite)
  return _named(folder, given_autoencoder, take)


def check(folder: pathlib.Path) -> Imported:
  """Returns the model in a folder as `read` does, its weights compared by name and shape only.

  `params` are the names of its tensors. Checksums are not looked at.

  Raises:
    CalmError: as `read`, for what can be told without reading weights.
  """
  return _named(folder, "", names.check)


def _named(folder: pathlib.Path, given_autoencoder: str, take: Take) -> Imported:
  """Returns what `_read` does; its errors name the folder."""
  try:
    return _read(folder, given_autoencoder, take)
  except errors.CalmError as error:
    if str(folder) in str(error):
      raise
    raise errors.CalmError(f"{folder / 'config.json'}: {error}") from error
  except OSError as error:  # What is there can't be looked at.
    raise errors.CalmError(f"can't read {folder}: {error}") from error


def _read(folder: pathlib.Path, given_autoencoder: str, take: Take) -> Imported:
  settings, source = Settings(folder), tensors.open_folder(folder)
  is_calm = any(name.startswith("transformer.") for name in source)
  if given_autoencoder and not is_calm:
    raise errors.CalmError(
      f"--autoencoder={given_autoencoder} is for a CALM language model, and {folder} holds none"
    )
  if is_calm:
    return _read_calm(folder, source, settings, given_autoencoder, take)
  if any(name.startswith("model.layers.") for name in source):
    return _read_llama(folder, source, settings, take)
  if any(name.startswith("encoder.") for name in source):
    return _read_autoencoder(folder, source, settings, take)
  raise errors.CalmError(
    f"{folder} holds no model that is known: neither a CALM language model nor its autoencoder nor "
    f"a LlamaForCausalLM; one of its tensors is {min(source, default='(none)')}"
  )
