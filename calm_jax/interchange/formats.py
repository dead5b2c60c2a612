"""Where a format is chosen: one row a format."""

from collections.abc import Callable, Mapping

from etils import epath

from calm_jax import config, errors, files, workdir
from calm_jax.interchange import (
  checksums,
  destination,
  to_llama,
  to_onnx,
  to_reference,
  to_stablehlo,
  to_torch,
  to_workdir,
)

WORKDIR = "workdir"
# What each stage is written by.
WRITERS: Mapping[str, Mapping[str, Callable[..., None]]] = {
  "reference": to_reference.WRITERS,
  "llama": {"transformer": to_llama.write},
  "torch": to_torch.WRITERS,
  "stablehlo": to_stablehlo.WRITERS,
  "onnx": to_onnx.WRITERS,
}
FORMATS = (WORKDIR, *WRITERS)


def convert(
  source: str,
  output: str,
  kind: str,
  autoencoder: str = "",
  tokenizer: str = "",
  allow_nonfinite: bool = False,
) -> None:
  """Writes the model in `source` as the folder `output`, whole or not at all.

  Args:
    kind: a row of FORMATS. `workdir` takes another framework's folder, the others a
      workdir.
    autoencoder, tokenizer, allow_nonfinite: see `to_workdir.write`.

  Raises:
    CalmError: if the source can't be read, its stage does not exist in that format,
      or the output can't be written.
  """
  if kind not in FORMATS:
    raise errors.CalmError(f"--format is {kind!r}: {config.nearest(kind, FORMATS)}")
  if kind == WORKDIR:
    destination.require_local(source)
  files.require_reachable(str(epath.Path(source) / "config.json"))
  is_workdir = workdir.exists(source) and (epath.Path(source) / "origin.json").exists()
  if is_workdir and kind == WORKDIR:
    raise errors.CalmError(
      f"{source} is a workdir already; it can be written as {', '.join(WRITERS)}"
    )
  if not is_workdir and kind != WORKDIR and workdir.exists(source):
    raise errors.CalmError(
      f"{source} is a folder of another framework: convert it with --format=workdir first, and "
      f"that to --format={kind}"
    )
  if kind == WORKDIR:
    to_workdir.write(source, output, autoencoder, tokenizer, allow_nonfinite)
    return
  for name, value in (
    ("autoencoder", autoencoder), ("tokenizer", tokenizer), ("allow_nonfinite", allow_nonfinite)
  ):  # fmt: skip
    if value:
      raise errors.CalmError(f"--{name} is for --format=workdir alone; a workdir has its own")
  stage, writers = workdir.read_run(source).stage, WRITERS[kind]
  if stage not in writers:
    fitting = [name for name, row in WRITERS.items() if stage in row]
    raise errors.CalmError(
      f"--format={kind} is for {' and '.join(writers)}, but {source} holds stage {stage!r}, "
      f"which can be written as {', '.join(fitting)}"
    )
  with destination.new_folder(output) as folder:
    writers[stage](workdir.load(source), folder, source, output)
    checksums.write(folder)
