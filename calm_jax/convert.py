"""Converts models: `python -m calm_jax.convert --source=DIR --output=DIR --format=FORMAT`.

`--format=workdir` imports a folder of the reference, of Hugging Face's Llama or of our own
format for PyTorch; any other format exports a workdir. The output is complete or does not
exist. Exported folders carry SHA256SUMS in the format of sha256sum(1); an imported folder that
has this file is checked against it.
"""

from calm_jax import interrupts

if __name__ == "__main__":
  interrupts.end_at_once()

from absl import flags

from calm_jax import cli, errors
from calm_jax.running import conversion

_SOURCE = flags.DEFINE_string(
  "source",
  None,
  "Folder to convert: another framework's for --format=workdir, otherwise a workdir.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist yet.")
_FORMAT = flags.DEFINE_string("format", None, f"What to write: {', '.join(conversion.formats())}.")
_AUTOENCODER = flags.DEFINE_string(
  "autoencoder", "", "Folder of the autoencoder, if an imported language model does not contain it."
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", "", "tokenizer.json or .model file, if an imported folder has none."
)
_NONFINITE = flags.DEFINE_bool(
  "allow_nonfinite", False, "Import NaN and infinite weights, which are otherwise refused."
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
