"""A workdir -> folders in the reference's own layout, for its classes to load."""

import dataclasses
import os
import pathlib

from calm_jax import errors, files, workdir
from calm_jax.interchange import (
  checksums,
  companions,
  names,
  reading,
  settings,
  tensors,
  to_llama,
)


def _twice(outgoing: list[tensors.Outgoing], prefix: str = "") -> list[tensors.Outgoing]:
  """Returns tensors with the autoencoder's table under its decoder's name besides.

  The reference ties the two, but its loader leaves that name unset where a file lacks it.
  """
  table, copy, _ = (f"{prefix}{name}" for name in names.AUTOENCODER_TABLE)
  (held,) = (tensor for tensor in outgoing if tensor.name == table)
  return [dataclasses.replace(held, name=copy), *outgoing]


def calm_tensors(trained: workdir.TrainedCalm) -> list[tensors.Outgoing]:
  """Returns a language model's tensors with its autoencoder's among them."""
  codec = trained.autoencoder
  inside = names.autoencoder(codec.run.model, reading.AUTOENCODER_PREFIX)
  return names.outgoing(codec.params, inside) + names.outgoing(
    trained.params, names.calm(trained.run.model, trained.run.head)
  )


def write_autoencoder(
  trained: workdir.TrainedAutoencoder, folder: pathlib.Path, source: str, output: str
) -> None:
  """Writes an autoencoder's folder."""
  outgoing = names.outgoing(trained.params, names.autoencoder(trained.run.model))
  tensors.write_folder(folder, _twice(outgoing))
  files.write(folder / "config.json", files.to_json(settings.autoencoder(trained)))
  companions.write(folder, trained, source, _AUTOENCODER_USE)


def write_calm(
  trained: workdir.TrainedCalm, folder: pathlib.Path, source: str, output: str
) -> None:
  """Writes a language model's folder with its autoencoder's inside.

  Raises:
    CalmError: for a model that the reference can't express.
  """
  if trained.run.model.input != "discrete":
    raise errors.CalmError(
      f"the reference has no model with input={trained.run.model.input}: use --format=torch"
    )
  inner = folder / workdir.AUTOENCODER
  inner.mkdir()
  write_autoencoder(trained.autoencoder, inner, str(pathlib.Path(source) / workdir.AUTOENCODER), "")
  checksums.write(inner)  # It is a folder by itself, too.
  tensors.write_folder(folder, _twice(calm_tensors(trained), reading.AUTOENCODER_PREFIX))
  place = os.path.join(os.path.abspath(output), workdir.AUTOENCODER)
  values = {"model_type": "", "ae_path": place, **settings.calm(trained)}
  files.write(folder / "config.json", files.to_json(values))
  companions.write(folder, trained, source, _CALM_USE)


WRITERS = {
  "autoencoder": write_autoencoder,
  "calm": write_calm,
  "transformer": to_llama.write,
}

_AUTOENCODER_USE = """The folder is in the layout of the CALM reference implementation, whose
autoencoder class loads it."""
_CALM_USE = """The folder is in the layout of the CALM reference implementation, whose classes load
it. `ae_path` in config.json names the folder `autoencoder/` where it was written: change it if
you move both, and write SHA256SUMS anew with sha256sum."""
