"""The act of moving: `python -m calm_jax.convert --source=DIR --output=DIR --format=FORMAT`.

Into a workdir (`--format=workdir`) from a folder of the reference, of Hugging Face's
Llama or of ours for PyTorch; out of a workdir with any other format. The output is
there whole at the end or not at all. Folders that come out carry SHA256SUMS, as
sha256sum(1) writes and checks it; one that goes in is held against it.
"""

from calm_jax import interrupts

if __name__ == "__main__":
  interrupts.end_at_once()

from absl import flags

from calm_jax import cli, errors
from calm_jax.running import conversion

_SOURCE = flags.DEFINE_string(
  "source", None, "Folder to convert: another framework's for --format=workdir, else a workdir."
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist yet.")
_FORMAT = flags.DEFINE_string("format", None, f"What to write: {', '.join(conversion.formats())}.")
_AUTOENCODER = flags.DEFINE_string(
  "autoencoder", "", "Folder of the autoencoder, where an imported language model has none inside."
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", "", "tokenizer.json or .model file, where an imported folder has none."
)
_NONFINITE = flags.DEFINE_bool(
  "allow_nonfinite", False, "Import NaN and infinite weights, which are refused otherwise."
)


def main() -> None:
  source, output, kind = _SOURCE.value, _OUTPUT.value, _FORMAT.value
  if not (source and output and kind):
    raise errors.CalmError(
      f"give --source=DIR, --output=DIR and --format, one of {', '.join(conversion.formats())}"
    )
  conversion.convert(source, output, kind, _AUTOENCODER.value, _TOKENIZER.value, _NONFINITE.value)
  print(f"wrote {output}")


if __name__ == "__main__":
  cli.run(main)
