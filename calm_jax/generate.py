"""Generates text: `python -m calm_jax.generate --workdir=W --prompt=TEXT`.

Streams the prompt and its continuation to standard output; all else goes to standard error.
Texts are also appended to the workdir's samples.jsonl. `--prompts=FILE` reads a JSONL file with
one prompt per line and writes one line per text to `--output`; `--interactive` continues each line
that is typed. On a terminal, control characters of a text are escaped, as in \\x1b; files, pipes
and `--raw` receive them unchanged.
"""

import contextlib
import io
import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags

from calm_jax import cli, config, errors, files, lease, workdir
from calm_jax.generation import (
  choosers,
  precision,
  prompts,
  requests,
  rules,
  session,
  text,
)
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.running import loading, texts

_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of a language model's training run.")
_PROMPT = flags.DEFINE_string(
  "prompt", "", "Text to continue; - reads it from standard input; empty starts a document."
)
_PROMPTS = flags.DEFINE_string(
  "prompts",
  "",
  'JSONL file, one line per text: {"prompt": ...}, which may also set '
  + ", ".join(prompts.OWN)
  + ". Needs --output.",
)
_OUTPUT = flags.DEFINE_string(
  "output", "", "JSONL file for the texts of --prompts; the same command resumes it."
)
_INTERACTIVE = flags.DEFINE_bool(
  "interactive", False, "Continue each line of standard input; a final \\ joins the next line."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "In (0, 1] for CALM, any for the baseline.")
_NUM_CANDIDATES = flags.DEFINE_integer(
  "num_candidates",
  requests.Request.num_candidates,
  "Maximum draws per patch below temperature 1; with more, texts follow the tempered distribution "
  "more closely and are less diverse.",
)
_RULE = flags.DEFINE_enum(
  "rule",
  None,
  list(rules.RULES),
  "What settles a patch below temperature 1 before its draws run out: direct: a single draw of a "
  "tempered head; first: the patch that is first drawn 1/T times; exact: P^(1/T), by the paper's "
  "first algorithm; none: nothing. By default direct if the workdir has a tempered head, otherwise "
  "first.",
)
_DRAW_TEMPERATURE = flags.DEFINE_float(
  "draw_temperature",
  0.0,
  "Temperature of the draws that a race compares, if the workdir has a tempered head; by default "
  "the text's own for --rule=direct, otherwise 1.",
  0.0,
  1.0,
)
_AT_LIMIT = flags.DEFINE_enum(
  "at_limit",
  requests.Sampler.at_limit,
  [*choosers.CHOOSERS, requests.ERROR],
  "How a patch is chosen once the draws run out: prefix: token by token, by the number of draws "
  "with that prefix; batch: a complete patch by its count, the paper's second algorithm; error: "
  "not at all, the command fails.",
)
_WEIGHTS = flags.DEFINE_enum(
  "weights", "float32", list(precision.WEIGHTS), "Number format of the weights in memory."
)
_MESH = flags.DEFINE_string(
  "mesh", "fsdp=1", "Devices that share the model and the texts, as in training: data=2,fsdp=4."
)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "New tokens after which a text ends.")
_STOP = flags.DEFINE_multi_string(
  "stop", [], "A text ends before this string; may be given repeatedly."
)
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same text.", 0, 2**32 - 1)
_NUM_TEXTS = flags.DEFINE_integer(
  "num_texts", 1, "Texts to generate from --prompt.", 1, requests.MOST["number"]
)
_BATCH = flags.DEFINE_integer("batch", 16, "Texts generated at once.", 1, 2**16)
_EVERY = flags.DEFINE_integer(
  "every",
  0,
  "Patches generated between two reads of a text; by default 1 for one text, otherwise 16.",
  0,
  2**16,
)
_RAW = flags.DEFINE_bool(
  "raw", False, "Print control characters of a text unchanged to a terminal, which acts on them."
)


def _note(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _show(written: str, end: str = "\n") -> None:
  """Prints generated text."""
  print(text.for_stream(sys.stdout, written, _RAW.value), end=end, flush=True)


def _read_prompt() -> str:
  """Returns the prompt; CalmError if it is not UTF-8."""
  try:
    if _PROMPT.value == "-":
      return sys.stdin.buffer.read().decode()
    return _PROMPT.value.encode().decode()
  except UnicodeError as error:
    raise errors.CalmError(f"the prompt is not UTF-8: {error}") from error


def _mesh() -> config.Mesh:
  """Returns the mesh that --mesh describes."""
  sizes = {}
  for part in _MESH.value.split(","):
    name, _, size = part.partition("=")
    digits = size.removeprefix("-")
    is_new_axis = name in ("data", "fsdp", "sequence", "tensor") and name not in sizes
    config.require(
      is_new_axis and digits.isdecimal() and len(digits) < 10,
      f"--mesh has {part!r}: give sizes of data, fsdp, sequence, tensor, such as data=2,fsdp=4",
    )
    sizes[name] = int(size)
  return config.Mesh(**{"fsdp": 1, **sizes})


class _Generator:
  """One invocation of the command: a loaded model and the requests that it serves.

  A request is a mapping of the fields of `requests.Request`, with its prompt as text.
  """

  def __init__(self, common: dict[str, Any]):
    """Loads the model; `common` holds the fields that all requests share."""
    trained = loading.load(_WORKDIR.value)
    how = texts.require_writing(trained.run, f"{_WORKDIR.value} holds")
    rule = _RULE.value or how.rule
    self._trained, self._common = precision.WEIGHTS[_WEIGHTS.value](trained), common
    self._tokenizer = workdir.tokenizer(_WORKDIR.value, trained.origin)
    sampler = requests.Sampler(rule, _AT_LIMIT.value, _DRAW_TEMPERATURE.value)
    self._decoder = texts.decoder(self._trained, sampler, _note)
    self.session = session.Session(self._decoder, self._tokenizer)
    # Recorded with every text; an output can be resumed only with the same values.
    self._conditions = {
      "rule": rule,
      "at_limit": _AT_LIMIT.value,
      **({"draw_temperature": _DRAW_TEMPERATURE.value} if _DRAW_TEMPERATURE.value else {}),
      "weights": _WEIGHTS.value,
      "step": trained.step,
    }

  def _encoded(self, request: Mapping[str, Any]) -> requests.Request:
    tokens = tuple(self._tokenizer.encode(request["prompt"]))
    return requests.Request(**{**request, "prompt": tokens, "stop": tuple(request["stop"])})

  def _write(self, batch: list[dict[str, Any]], show=lambda row, piece: None) -> list[str]:
    """Generates a batch of texts and returns a line of JSON for each."""
    every = _EVERY.value or (1 if len(batch) == 1 else 16)
    written = self.session.write([self._encoded(request) for request in batch], every, show)
    return [
      prompts.line({**request, **self._conditions}, result.record())
      for request, result in zip(batch, written, strict=True)
    ]

  def one_prompt(self, prompt: str) -> None:
    """Prints texts of one prompt: a single text as it is generated, several once complete."""
    for begin in range(0, _NUM_TEXTS.value, _BATCH.value):
      numbers = range(begin, min(begin + _BATCH.value, _NUM_TEXTS.value))
      batch = [{**self._common, "prompt": prompt, "number": number} for number in numbers]
      if len(batch) == 1:
        self._stream(batch[0])
        continue
      lines = self._write(batch)
      self._append_samples(lines)
      for request, line in zip(batch, lines, strict=True):
        _note(f"--- text {request['number'] + 1} of {_NUM_TEXTS.value}")
        _show(prompt + json.loads(line)["text"])

  def _stream(self, request: dict[str, Any]) -> None:
    has_shown = False

    def show(row: int, piece: str) -> None:
      nonlocal has_shown
      # The prompt is printed with the first piece, after any note about it.
      _show(piece if has_shown else request["prompt"] + piece, end="")
      has_shown = True

    try:
      self._append_samples(self._write([request], show))
    finally:
      if has_shown:
        print(flush=True)

  def _append_samples(self, lines: list[str]) -> None:
    workdir.append_samples(_WORKDIR.value, lines)

  def file(self, output_lease: lease.Lease) -> None:
    """Writes the texts of a file of prompts, from where an earlier run stopped.

    Args:
      output_lease: keeps other processes from writing to the output.
    """
    batch = prompts.read(_PROMPTS.value, self._common)
    for request in batch:  # Checks all of them before the first text is generated.
      try:
        self._decoder.law.powers(self._encoded(request))
      except errors.CalmError as error:
        where = f"{_PROMPTS.value}, line {request['number'] + 1}"
        raise errors.CalmError(f"{where}: {error}") from error
    num_done = prompts.written(
      _OUTPUT.value, [{**request, **self._conditions} for request in batch]
    )
    files.append(_OUTPUT.value, "")  # Fails here if the file can't be written.
    if num_done:
      _note(f"{_OUTPUT.value} holds {num_done} of {len(batch)} texts: resuming")
    for begin in range(num_done, len(batch), _BATCH.value):
      chunk = batch[begin : begin + _BATCH.value]
      lines = self._write(chunk)
      output_lease.require_held()
      files.append(_OUTPUT.value, "".join(lines))
      _note(f"{begin + len(chunk)} of {len(batch)} texts")

  def interactive(self) -> None:
    """Continues every line of standard input; Ctrl-C ends a text, the end of input the session."""
    number, earlier_lines = 0, ""
    while True:
      if sys.stdin.isatty():
        print("... " if earlier_lines else "> ", end="", file=sys.stderr, flush=True)
      line_bytes = sys.stdin.buffer.readline()
      if not line_bytes:
        return
      try:
        prompt = earlier_lines + line_bytes.decode().rstrip("\r\n")
      except UnicodeError as error:
        _note(f"error: the prompt is not UTF-8: {error}")
        continue
      earlier_lines = prompt[:-1] + "\n" if prompt.endswith("\\") else ""
      if earlier_lines:
        continue
      try:
        self._stream({**self._common, "prompt": prompt, "number": number})
      except KeyboardInterrupt:
        _note("stopped; Ctrl-D ends")
      except errors.CalmError as error:
        _note(f"error: {error}")
      number += 1


def main() -> None:
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")  # For characters that its encoding lacks.
  if not _WORKDIR.value:
    raise errors.CalmError("give --workdir=DIR, the folder of a language model's training run")
  config.require(
    bool(_PROMPTS.value) == bool(_OUTPUT.value), "--prompts=FILE and --output=FILE go together"
  )
  sources = [name for name in ("prompt", "prompts", "interactive") if flags.FLAGS[name].value]
  config.require(len(sources) < 2, f"--{' and --'.join(sources)} can't be given together")
  common = {
    "temperature": _TEMPERATURE.value,
    "num_candidates": _NUM_CANDIDATES.value,
    "max_tokens": _MAX_TOKENS.value,
    "seed": _SEED.value,
    "stop": _STOP.value,
  }
  requests.Request(**{**common, "stop": tuple(_STOP.value)})
  output = _OUTPUT.value
  lock = lease.Lease(lease.of_file(output), f"--output={output}") if output else None
  with lock or contextlib.nullcontext() as output_lease, jax.set_mesh(mesh_lib.build(_mesh())):
    generator = _Generator(common)
    if output_lease:
      generator.file(output_lease)
    elif _INTERACTIVE.value:
      generator.interactive()
    else:
      generator.one_prompt(_read_prompt())
  if generator.session.speed.patches:
    _note(generator.session.speed.line())


if __name__ == "__main__":
  cli.run(main)
