"""A trained stage -> a folder in the layout of the reference, whose classes load it."""

import dataclasses
import os

from calm_jax import errors, files
from calm_jax.interchange import export, names, reading, settings, tensors
from calm_jax.training import trained as trained_lib


def _with_copied_table(
  outgoing: list[tensors.Outgoing], prefix: str = ""
) -> list[tensors.Outgoing]:
  """Returns tensors with a second copy of the autoencoder's table, under its decoder's name.

  The reference ties the two, but its loader leaves the decoder's unset if a file lacks it.
  """
  table_name, copy_name, _ = (f"{prefix}{name}" for name in names.AUTOENCODER_TABLE)
  (table,) = (tensor for tensor in outgoing if tensor.name == table_name)
  return [dataclasses.replace(table, name=copy_name), *outgoing]


def calm_tensors(trained: trained_lib.Trained) -> list[tensors.Outgoing]:
  """Returns the tensors of a language model and of its autoencoder."""
  autoencoder = trained.parents["autoencoder"]
  autoencoder_names = names.autoencoder(autoencoder.run.model, reading.AUTOENCODER_PREFIX)
  own_names = names.calm(trained.run.model, trained.run.head)
  return [
    *names.outgoing(autoencoder.params, autoencoder_names),
    *names.outgoing(trained.model.drawing(trained.params), own_names),
  ]


def write_autoencoder(request: export.Export) -> str:
  """Writes an autoencoder's folder; see `export.Writer`."""
  trained, folder = request.trained, request.folder
  outgoing = names.outgoing(trained.params, names.autoencoder(trained.run.model))
  tensors.write_folder(folder, _with_copied_table(outgoing))
  files.write(folder / "config.json", files.to_json(settings.autoencoder(trained)))
  return _AUTOENCODER_USE


def write_calm(request: export.Export) -> str:
  """Writes a language model's folder, with its autoencoder's folder inside.

  Raises:
    CalmError: for a model that the reference can't express.
  """
  trained, folder = request.trained, request.folder
  if trained.run.model.input != "discrete":
    raise errors.CalmError(
      f"the reference has no model with input={trained.run.model.input}: use --format=torch"
    )
  request.parent("autoencoder")
  outgoing = _with_copied_table(calm_tensors(trained), reading.AUTOENCODER_PREFIX)
  tensors.write_folder(folder, outgoing)
  ae_path = os.path.join(os.path.abspath(request.output), "autoencoder")
  values = {"model_type": "", "ae_path": ae_path, **settings.calm(trained)}
  files.write(folder / "config.json", files.to_json(values))
  return _CALM_USE


_AUTOENCODER_USE = """The folder is in the layout of the CALM reference implementation, whose
autoencoder class loads it."""
_CALM_USE = """The folder is in the layout of the CALM reference implementation, whose classes load
it. `ae_path` in config.json is the absolute path of the folder `autoencoder/`: change it if you
move both, and rewrite SHA256SUMS with sha256sum."""
