"""The act of writing: `python -m calm_jax.generate --workdir=W --prompt=TEXT`.

The prompt and its continuation go to standard output as they come, everything
else to standard error. Texts are also kept in the workdir's samples.jsonl.
"""

import json
import sys
import time

import jax
from absl import flags
from etils import epath

from calm_jax import cli, errors, files, workdir
from calm_jax.generation import decode

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a language model's training run.")
_PROMPT = flags.DEFINE_string(
  "prompt", "", "Text to go on from; - reads it from standard input; empty begins a document."
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 1.0, "CALM: 1/n, 1, 0.5, 0.3333, 0.25, ...; the baseline: any."
)
_NUM_CANDIDATES = flags.DEFINE_integer(
  "num_candidates", 200, "Draws a patch below temperature 1; more is nearer to the exact law."
)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "New tokens after which a text ends.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same text.", 0, 2**32 - 1)
_NUM_TEXTS = flags.DEFINE_integer("num_texts", 1, "Texts to write, one after the other.", 1)


def _note(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _read_prompt() -> str:
  """Returns the prompt; CalmError if it is no UTF-8."""
  try:
    if _PROMPT.value == "-":
      return sys.stdin.buffer.read().decode()
    return _PROMPT.value.encode().decode()
  except UnicodeError as error:
    raise errors.CalmError(f"the prompt is not UTF-8: {error}") from error


def main() -> None:
  if not _WORKDIR.value:
    raise errors.CalmError("give --workdir=DIR, the folder of a language model's training run")
  settings = decode.Settings(_TEMPERATURE.value, _NUM_CANDIDATES.value, _MAX_TOKENS.value)
  trained = workdir.load(_WORKDIR.value)
  if isinstance(trained, workdir.TrainedAutoencoder):
    raise errors.CalmError(f"{_WORKDIR.value} holds an autoencoder, which writes no text by itself")
  tokenizer = workdir.tokenizer(_WORKDIR.value, trained.origin)
  prompt = _read_prompt()
  prompt_tokens = tokenizer.encode(prompt)
  decoder = decode.Decoder(trained, settings, _note)
  for number in range(_NUM_TEXTS.value):
    if _NUM_TEXTS.value > 1:
      _note(f"--- text {number + 1} of {_NUM_TEXTS.value}")
    key = jax.random.fold_in(jax.random.key(_SEED.value), number)
    start, patches, written = time.perf_counter(), [], []

    def new_tokens(key=key, patches=patches):
      for patch in decoder.tokens(prompt_tokens, key):
        patches.append(patch)
        yield patch

    for piece in decode.pieces(tokenizer.decode, prompt_tokens, new_tokens()):
      # The prompt waits for the first piece, so that a note on it comes before both.
      print(piece if written else prompt + piece, end="", flush=True)
      written.append(piece)
    print(flush=True)
    count, seconds = sum(map(len, patches)), time.perf_counter() - start
    _note(f"{count} tokens in {seconds:.1f} s, compiling included where it is the first text")
    record = {
      "prompt": prompt, "text": "".join(written), "temperature": settings.temperature,
      "num_candidates": settings.num_candidates, "seed": _SEED.value, "number": number,
      "step": trained.step,
    }  # fmt: skip
    files.append(epath.Path(_WORKDIR.value) / workdir.SAMPLES, json.dumps(record) + "\n")


if __name__ == "__main__":
  cli.run(main)
