"""Folders of the reference -> our settings and parameters."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from calm_jax import config, errors
from calm_jax.interchange import names, tensors
from calm_jax.models import autoencoder, calm, transformer

Params = Any
Source = Mapping[str, tensors.Stored]

AUTOENCODER_PREFIX = "ae_model."
# What every model of ours has, and what another value would mean is not built here.
_FIXED_VALUES = {
  "rms_norm_eps": 1e-6,
  "hidden_act": "silu",
  "attention_bias": False,
  "mlp_bias": False,
  "rope_scaling": None,
}


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


class Settings:
  """A config.json, read with care."""

  def __init__(self, folder: pathlib.Path):
    self._path = folder / "config.json"
    self._values = tensors.read_json(self._path)
    for name, ours in _FIXED_VALUES.items():
      value = self._values.get(name, ours)
      if value != ours:
        raise errors.CalmError(f"{self._path}: {name} is {value!r}; only {ours!r} can be converted")
    new = self._values.get("rope_parameters") or {}  # Where newer transformers keep them.
    kind = new.get("rope_type", "default") if isinstance(new, dict) else new
    if kind != "default":
      raise errors.CalmError(
        f"{self._path}: rope_type is {kind!r}; only 'default' can be converted"
      )
    self._values |= new

  def number(self, name: str, default: int | float | None = None) -> Any:
    """Returns a positive number; CalmError if it is none or is missing without a default."""
    value = self._values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
      raise errors.CalmError(f"{self._path}: {name} must be a number above 0, got {value!r}")
    return value

  def whole(self, name: str, default: int | None = None) -> int:
    """Returns a positive whole number; see `number`."""
    value = self.number(name, default)
    if not isinstance(value, int):
      raise errors.CalmError(f"{self._path}: {name} must be a whole number, got {value!r}")
    return value

  def text(self, name: str) -> str:
    """Returns a string, empty if it is missing or none."""
    value = self._values.get(name)
    return value if isinstance(value, str) else ""

  def has(self, name: str) -> bool:
    """Tells whether the setting is there and not null."""
    return self._values.get(name) is not None

  @property
  def tied(self) -> bool:
    return bool(self._values.get("tie_word_embeddings", False))

  @property
  def eos_id(self) -> int | None:
    """Returns the id that ends a document, the first where there are several."""
    value = self._values.get("eos_token_id")
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) else None

  @property
  def dtype(self) -> Any:
    """Returns what the model is said to compute in, where that is one of ours."""
    name = self.text("torch_dtype") or self.text("dtype")
    return name if name in ("float32", "bfloat16") else "float32"

  def require(self, **found: int) -> None:
    """Raises CalmError where a named setting is there and is not what the weights have."""
    for name, value in found.items():
      stated = self._values.get(name)
      if stated is not None and stated != value:
        raise errors.CalmError(
          f"{self._path} says {name} = {stated!r}, but its weights have {value!r}"
        )

  def transformer(self) -> dict[str, Any]:
    """Returns the settings of the Llama layers."""
    heads = self.whole("num_attention_heads")
    width = self.whole("hidden_size")
    self.require(head_dim=width // heads)
    return {
      "layers": self.whole("num_hidden_layers"),
      "width": width,
      "ffn": self.whole("intermediate_size"),
      "heads": heads,
      "kv_heads": self.whole("num_key_value_heads", heads),
      "rope_theta": float(self.number("rope_theta", 10000.0)),
    }

  def vocab_size(self, name: str, table: tensors.Stored) -> int:
    """Returns the rows of a token table, which may be padded by one beyond the setting."""
    rows, stated = table.shape[0], self.whole("vocab_size", table.shape[0])
    if rows not in (stated, stated + 1):
      raise errors.CalmError(f"{self._path} says vocab_size = {stated}, but {name} has {rows} rows")
    return rows


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


def _count(source: Source, prefix: str) -> int:
  """Returns one more than the highest number that follows `prefix` in a name, 0 without any."""
  found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in source)
  return max((1 + int(match[1]) for match in found if match), default=0)


def _table(source: Source, folder: pathlib.Path, prefix: str) -> tuple[str, tensors.Stored]:
  """Returns the autoencoder's token table, under whichever name it is there."""
  return _matrix(source, folder, *(f"{prefix}{name}" for name in names.AUTOENCODER_TABLE))


def _autoencoder(source: Source, prefix: str, folder: pathlib.Path, dtype: Any) -> Imported:
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
      encoder_layers=_count(source, f"{prefix}encoder.encoder_layers"),
      decoder_layers=_count(source, f"{prefix}decoder.decoder_layers"),
    )
  except errors.CalmError as error:
    raise errors.CalmError(f"the autoencoder in {folder} can't be: {error}") from error
  shapes = jax.eval_shape(autoencoder.Autoencoder(sizes, vocab_size).initial, jax.random.key(0))
  own = {name: stored for name, stored in source.items() if name.startswith(prefix)}
  params = names.read(own, names.autoencoder(sizes, prefix), shapes, folder)
  run = config.AutoencoderRun(
    data=config.Data(context=2048 * sizes.patch_size),
    model=sizes,
    training=config.Training(compute_dtype=dtype),
  )
  return Imported(run, vocab_size, params)


def _read_autoencoder(folder: pathlib.Path, source: Source, settings: Settings) -> Imported:
  imported = _autoencoder(source, "", folder, settings.dtype)
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
  folder: pathlib.Path, source: Source, settings: Settings, given: str
) -> Imported:
  """Returns a language model's autoencoder: the given one, its own, or the one ae_path names."""
  inside = any(name.startswith(AUTOENCODER_PREFIX) for name in source)
  own = _autoencoder(source, AUTOENCODER_PREFIX, folder, settings.dtype) if inside else None
  if own and not given:
    return own
  path = settings.text("ae_path")
  places = [pathlib.Path(given)] if given else [folder / path, pathlib.Path(path)] if path else []
  place = next((place for place in places if _has_config(place)), None)
  if place is None:
    raise errors.CalmError(
      f"--autoencoder={given} is no folder with a config.json"
      if given
      else f"{folder} holds no autoencoder, and its ae_path {path!r} leads nowhere: give "
      "--autoencoder=DIR"
    )
  found = _read_autoencoder(place, tensors.open_folder(place), Settings(place))
  if own and not _equal(own, found):
    raise errors.CalmError(
      f"{folder} holds an autoencoder of its own, which is not the one in {place}: leave out "
      "--autoencoder"
    )
  return found


def _equal(a: Imported, b: Imported) -> bool:
  same_sizes = a.run.model == b.run.model and a.vocab_size == b.vocab_size
  return same_sizes and all(
    np.array_equal(x, y)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
  )


def _head(source: Source, folder: pathlib.Path, settings: Settings, latent: int) -> config.Head:
  """Returns the head that the tensors' names tell, whatever config.json calls the model."""
  blocks, noise = settings.whole("num_mlp_layers"), settings.whole("noise_size", 64)
  steps = settings.whole("sampling_steps", 0) if settings.has("sampling_steps") else 0
  if any(name.startswith(("generative_head.mlp_blocks.", "mlp_generator.")) for name in source):
    return config.Head(kind="energy", blocks=blocks, noise=noise)
  out = "generative_head.net.final_layer.linear.weight"
  if out in source:
    rows = _matrix(source, folder, out)[1].shape[0]
    kinds = {latent: "flow", 2 * latent: "diffusion"}
    if rows in kinds:
      return config.Head(kind=kinds[rows], blocks=blocks, steps=steps)
  found = sorted(name for name in source if "head" in name)
  raise errors.CalmError(
    f"{folder} holds no head that is known (energy, flow, diffusion); of its tensors, "
    f"{found[0] if found else 'none'} comes nearest"
  )


def _read_calm(folder: pathlib.Path, source: Source, settings: Settings, given: str) -> Imported:
  codec = _find_autoencoder(folder, source, settings, given)
  sizes = codec.run.model
  assert isinstance(sizes, config.Autoencoder)
  settings.require(patch_size=sizes.patch_size, latent_size=sizes.latent)
  reads_tokens = "transformer.embed_tokens.weight" in source
  reads_latents = "latent_proj.weight" in source
  run = config.CalmRun(
    data=config.Data(context=settings.whole("max_position_embeddings", 2048) * sizes.patch_size),
    model=config.Backbone(
      **settings.transformer(),
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
  params = names.read(own, names.calm(run.model, run.head), shapes, folder)
  return Imported(run, vocab_size, params, settings.eos_id, codec)


def _read_llama(folder: pathlib.Path, source: Source, settings: Settings) -> Imported:
  kind = settings.text("model_type")
  if kind not in ("", "llama"):
    raise errors.CalmError(
      f"{folder} holds a model of type {kind!r}, whose layers may do what Llama's do not: only "
      "'llama' can be converted"
    )
  run = config.TransformerRun(
    data=config.Data(context=settings.whole("max_position_embeddings", 2048)),
    model=config.Transformer(**settings.transformer()),
    training=config.Training(batch=1024, compute_dtype=settings.dtype),
  )
  name = "model.embed_tokens.weight"
  vocab_size = settings.vocab_size(*_matrix(source, folder, name))
  model = transformer.Transformer(run.model, vocab_size)
  shapes = jax.eval_shape(model.initial, jax.random.key(0))
  expected = names.transformer(run.model, settings.tied)
  params = names.read(source, expected, shapes, folder)
  return Imported(run, vocab_size, params, settings.eos_id)


def read(folder: pathlib.Path, given_autoencoder: str = "") -> Imported:
  """Returns the model in a folder of the reference, of ours for PyTorch, or of a plain Llama.

  What it is, is told from its tensors' names.

  Args:
    given_autoencoder: folder of the autoencoder of a language model; by default that in
      the model's own folder, then the one that its `ae_path` names.

  Raises:
    CalmError: for a folder that is no model of these, a config.json that contradicts
      the weights, and as `names.read` does.
  """
  try:
    return _read(folder, given_autoencoder)
  except errors.CalmError as error:
    if str(folder) in str(error):
      raise
    raise errors.CalmError(f"{folder / 'config.json'}: {error}") from error


def _read(folder: pathlib.Path, given_autoencoder: str) -> Imported:
  settings, source = Settings(folder), tensors.open_folder(folder)
  is_calm = any(name.startswith("transformer.") for name in source)
  if given_autoencoder and not is_calm:
    raise errors.CalmError(
      f"--autoencoder={given_autoencoder} is for a CALM language model, and {folder} holds none"
    )
  if is_calm:
    return _read_calm(folder, source, settings, given_autoencoder)
  if any(name.startswith("model.layers.") for name in source):
    return _read_llama(folder, source, settings)
  if any(name.startswith("encoder.") for name in source):
    return _read_autoencoder(folder, source, settings)
  raise errors.CalmError(
    f"{folder} holds no model that is known: neither a CALM language model nor its autoencoder nor "
    f"a LlamaForCausalLM; one of its tensors is {min(source, default='(none)')}"
  )
