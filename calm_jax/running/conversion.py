"""A workdir <-> a folder of another framework, written completely or not at all."""

import dataclasses
import pathlib
from collections.abc import Mapping

from etils import epath

from calm_jax import config, errors, files, workdir
from calm_jax.interchange import checksums, destination, export, reading, to_workdir
from calm_jax.running import card, loading
from calm_jax.stages import table
from calm_jax.training import trained as trained_lib

WORKDIR = "workdir"


def formats() -> tuple[str, ...]:
  """Returns the names of all formats: `workdir`, and those that any stage is exported to."""
  return (WORKDIR, *dict.fromkeys(name for spec in table.STAGES.values() for name in spec.writers))


def convert(
  source: str,
  output: str,
  kind: str,
  autoencoder: str = "",
  tokenizer: str = "",
  allow_nonfinite: bool = False,
) -> None:
  """Writes the model in `source` as the folder `output`, completely or not at all.

  Args:
    kind: one of `formats`. `workdir` converts another framework's folder, the others a workdir.
    autoencoder, tokenizer, allow_nonfinite: see `to_workdir.write`.

  Raises:
    CalmError: if the source can't be read, its stage can't be written in that format, or the
      output can't be written.
  """
  if kind not in formats():
    raise errors.CalmError(f"--format is {kind!r}: {config.nearest(kind, formats())}")
  if kind == WORKDIR:
    destination.require_local(source)
  files.require_reachable(str(epath.Path(source) / "config.json"))
  is_workdir = workdir.exists(source) and (epath.Path(source) / "origin.json").exists()
  if is_workdir and kind == WORKDIR:
    raise errors.CalmError(
      f"{source} is a workdir already; it can be written as {', '.join(formats()[1:])}"
    )
  if not is_workdir and kind != WORKDIR and workdir.exists(source):
    raise errors.CalmError(
      f"{source} is a folder of another framework: convert it with --format=workdir first, and "
      f"the result with --format={kind}"
    )
  if kind == WORKDIR:
    to_workdir.write(source, output, autoencoder, tokenizer, allow_nonfinite, run_of=_run_of)
    return
  flags = {"autoencoder": autoencoder, "tokenizer": tokenizer, "allow_nonfinite": allow_nonfinite}
  for name, value in flags.items():
    if value:
      raise errors.CalmError(f"--{name} is only for --format=workdir; a workdir has its own")
  _require_format(source, kind)
  with destination.new_folder(output) as folder:
    _write(loading.load(source, dtype="float32"), folder, source, output, kind)


def _run_of(imported: reading.Imported) -> config.Run:
  groups = {
    name: group if isinstance(group, Mapping) else dataclasses.asdict(group)
    for name, group in imported.settings.items()
  }
  return table.run_from({"stage": imported.stage, **groups})


def _require_format(source: str, kind: str) -> None:
  """Raises CalmError unless the stage of a workdir can be written in a format."""
  stage = loading.read_run(source).stage
  writers = table.STAGES[stage].writers
  if kind not in writers:
    fitting = [name for name, spec in table.STAGES.items() if kind in spec.writers]
    parents = [name for name, parent in table.STAGES[stage].parents.items() if parent in fitting]
    raise errors.CalmError(
      f"--format={kind} is for {' and '.join(fitting)}, but {source} holds stage {stage!r}, which "
      f"can be written as {', '.join(writers)}"
      + "".join(f"; {source}/{name} can be written as {kind}" for name in parents)
    )


def _write(
  trained: trained_lib.Trained, folder: pathlib.Path, source: str, output: str, kind: str
) -> None:
  """Fills a folder with a trained stage, its tokenizer, its model card and its checksums."""

  def write_parent(name: str) -> None:
    (folder / name).mkdir()
    parent_source, parent_output = (str(pathlib.Path(path) / name) for path in (source, output))
    _write(trained.parents[name], folder / name, parent_source, parent_output, kind)

  spec = table.of(trained.run)
  use = spec.writers[kind](export.Export(trained, folder, output, write_parent))
  card.write(folder, trained, source, use, spec.presentation)
  checksums.write(folder)
