"""A workdir -> folders in the reference's own layout, for its classes to load."""

import dataclasses
import os

from calm_jax import errors, files
from calm_jax.interchange import export, names, reading, settings, tensors
from calm_jax.training import trained as trained_lib


def _twice(outgoing: list[tensors.Outgoing], prefix: str = "") -> list[tensors.Outgoing]:
  """Returns tensors with the autoencoder's table under its decoder's name besides.

  The reference ties the two, but its loader leaves that name unset where a file lacks it.
  """
  table, copy, _ = (f"{prefix}{name}" for name in names.AUTOENCODER_TABLE)
  (held,) = (tensor for tensor in outgoing if tensor.name == table)
  return [dataclasses.replace(held, name=copy), *outgoing]


def calm_tensors(trained: trained_lib.Trained) -> list[tensors.Outgoing]:
  """Returns a language model's tensors with its autoencoder's among them."""
  autoencoder = trained.parents["autoencoder"]
  inside = names.autoencoder(autoencoder.run.model, reading.AUTOENCODER_PREFIX)
  return names.outgoing(autoencoder.params, inside) + names.outgoing(
    trained.params, names.calm(trained.run.model, trained.run.head)
  )


def write_autoencoder(request: export.Export) -> str:
  """Writes an autoencoder's folder; see `export.Writer`."""
  trained, folder = request.trained, request.folder
  outgoing = names.outgoing(trained.params, names.autoencoder(trained.run.model))
  tensors.write_folder(folder, _twice(outgoing))
  files.write(folder / "config.json", files.to_json(settings.autoencoder(trained)))
  return _AUTOENCODER_USE


def write_calm(request: export.Export) -> str:
  """Writes a language model's folder with its autoencoder's inside.

  Raises:
    CalmError: for a model that the reference can't express.
  """
  trained, folder = request.trained, request.folder
  if trained.run.model.input != "discrete":
    raise errors.CalmError(
      f"the reference has no model with input={trained.run.model.input}: use --format=torch"
    )
  request.parent("autoencoder")
  tensors.write_folder(folder, _twice(calm_tensors(trained), reading.AUTOENCODER_PREFIX))
  place = os.path.join(os.path.abspath(request.output), "autoencoder")
  values = {"model_type": "", "ae_path": place, **settings.calm(trained)}
  files.write(folder / "config.json", files.to_json(values))
  return _CALM_USE


_AUTOENCODER_USE = """The folder is in the layout of the CALM reference implementation, whose
autoencoder class loads it."""
_CALM_USE = """The folder is in the layout of the CALM reference implementation, whose classes load
it. `ae_path` in config.json names the folder `autoencoder/` where it was written: change it if
you move both, and write SHA256SUMS anew with sha256sum."""
