"""Memory of conversions: a reference folder of random weights to a workdir, and to PyTorch."""

import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
import tokenizers
from flax import traverse_util

from calm_jax import config, errors, files
from calm_jax.interchange import names, reading, settings, tensors
from calm_jax.models import autoencoder, calm
from calm_jax.planning import published
from calm_jax.stages import calm as calm_stage

VOCAB = published.VOCAB
AUTOENCODER = config.Autoencoder()
# CALM-XL.
RUN = calm_stage.Run(model=config.Backbone(layers=16, width=2560, ffn=6880))
POLL_SECONDS = 0.1


def _write_source(folder: pathlib.Path) -> int:
  """Writes a language model with its autoencoder as the reference would.

  Returns:
    Bytes of the weights.
  """
  module = autoencoder.Autoencoder(AUTOENCODER, VOCAB)
  model, rng = calm.Calm.build(RUN.model, RUN.head, AUTOENCODER, VOCAB), np.random.default_rng(0)
  outgoing = []
  for init, layout in (
    (module.initial, names.autoencoder(AUTOENCODER, reading.AUTOENCODER_PREFIX)),
    (model.initial, names.calm(RUN.model, RUN.head)),
  ):
    ours = traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0)), sep="/")
    outgoing += [
      tensors.Outgoing(
        t.name, t.shape(ours), lambda t=t, ours=ours: rng.random(t.shape(ours), np.float32)
      )
      for t in layout
    ]
  tensors.write_folder(folder, outgoing)
  values = settings.transformer(RUN.model) | {
    "vocab_size": VOCAB,
    "noise_size": RUN.head.noise,
    "num_mlp_layers": RUN.head.blocks,
  }
  files.write(folder / "config.json", files.to_json(values))
  pieces = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token="<unk>"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(["</s>"])
  tokenizer.save(str(folder / "tokenizer.json"))
  return 4 * sum(int(np.prod(tensor.shape)) for tensor in outgoing)


def _anonymous_bytes(process: int) -> int:
  """Returns a process's resident memory that no file backs; 0 after its end."""
  try:
    lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
  except OSError:
    return 0
  kibibytes = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
  return 1024 * max(kibibytes, default=0)


def _convert(source: pathlib.Path, output: pathlib.Path, kind: str) -> dict[str, Any]:
  command = [sys.executable, "-m", "calm_jax.convert"]
  command += [f"--source={source}", f"--output={output}", f"--format={kind}"]
  start, peak = time.perf_counter(), 0
  with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
    while process.poll() is None:
      peak = max(peak, _anonymous_bytes(process.pid))
      time.sleep(POLL_SECONDS)
  if process.returncode:
    raise errors.CalmError(f"{' '.join(command)} ended with {process.returncode}")
  return {"format": kind, "peak_bytes": peak, "seconds": time.perf_counter() - start}


def measure() -> tuple[list[str], list[dict[str, Any]]]:
  """Returns lines to print, and the figures: bytes and seconds, lower is better.

  Raises:
    CalmError: if the system has no /proc, or a conversion fails.
  """
  if not pathlib.Path("/proc/self/status").exists():
    raise errors.CalmError("--suite=convert reads memory from /proc, which this system lacks")
  with tempfile.TemporaryDirectory() as directory:
    folder = pathlib.Path(directory)
    (folder / "reference").mkdir()
    weights = _write_source(folder / "reference")
    figures = [_convert(folder / "reference", folder / "workdir", "workdir")]
    figures.append(_convert(folder / "workdir", folder / "torch", "torch"))
  lines = []
  for row in figures:
    row["weights_bytes"] = weights
    lines.append(
      f"to {row['format']}: {weights / 1e9:.2f} GB of weights, at most "
      f"{row['peak_bytes'] / 1e9:.2f} GB of anonymous memory, {row['seconds']:.0f} s"
    )
  return lines, figures
