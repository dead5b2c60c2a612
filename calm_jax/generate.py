"""The act of writing: `python -m calm_jax.generate --workdir=W --prompt=TEXT`.

The prompt and its continuation go to standard output as they come, everything
else to standard error. Texts are also kept in the workdir's samples.jsonl. With
`--prompts=FILE` every line of a JSONL file is a prompt, and `--output` takes a line a
text; with `--interactive` every line that is typed is one. A terminal is shown control
characters of a text as \\x1b and the like; files, pipes and `--raw` have them as they are.
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
  "prompt", "", "Text to go on from; - reads it from standard input; empty begins a document."
)
_PROMPTS = flags.DEFINE_string(
  "prompts",
  "",
  'JSONL file, a line a text: {"prompt": ...}, and of its own '
  + ", ".join(prompts.OWN)
  + ". Needs --output.",
)
_OUTPUT = flags.DEFINE_string(
  "output", "", "JSONL file for the texts of --prompts; the same command goes on with it."
)
_INTERACTIVE = flags.DEFINE_bool(
  "interactive", False, "Go on from each line of standard input; \\ at its end joins the next."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "CALM: in (0, 1]; the baseline: any.")
_NUM_CANDIDATES = flags.DEFINE_integer(
  "num_candidates",
  requests.Request.num_candidates,
  "Draws a patch below temperature 1, at most; more is nearer to the law and less diverse.",
)
_RULE = flags.DEFINE_enum(
  "rule",
  requests.Sampler.rule,
  list(rules.RULES),
  "What settles a patch below temperature 1 before its draws end: first: the patch that is first "
  "drawn 1/T times; exact: P^(1/T), by the paper's first algorithm; none: nothing.",
)
_AT_LIMIT = flags.DEFINE_enum(
  "at_limit",
  requests.Sampler.at_limit,
  [*choosers.CHOOSERS, requests.ERROR],
  "What chooses where the draws end: prefix: token by token, by how many draws go on with it; "
  "batch: whole patches by their number, the paper's second algorithm; error: the run ends.",
)
_WEIGHTS = flags.DEFINE_enum(
  "weights", "float32", list(precision.WEIGHTS), "What weights are kept as while writing."
)
_MESH = flags.DEFINE_string(
  "mesh", "fsdp=1", "Devices that share the model and the texts, as in training: data=2,fsdp=4."
)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "New tokens after which a text ends.")
_STOP = flags.DEFINE_multi_string("stop", [], "A text ends before this; may be given repeatedly.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same text.", 0, 2**32 - 1)
_NUM_TEXTS = flags.DEFINE_integer(
  "num_texts", 1, "Texts to write of --prompt.", 1, requests.MOST["number"]
)
_BATCH = flags.DEFINE_integer("batch", 16, "Texts written at once.", 1, 2**16)
_EVERY = flags.DEFINE_integer(
  "every", 0, "Patches between two looks at a text; by default 1 for one text, else 16.", 0, 2**16
)
_RAW = flags.DEFINE_bool(
  "raw", False, "Show a terminal control characters of a text as they are: they act on it."
)


def _note(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _show(written: str, end: str = "\n") -> None:
  """Prints what was written."""
  print(text.told_to(sys.stdout, written, _RAW.value), end=end, flush=True)


def _read_prompt() -> str:
  """Returns the prompt; CalmError if it is no UTF-8."""
  try:
    if _PROMPT.value == "-":
      return sys.stdin.buffer.read().decode()
    return _PROMPT.value.encode().decode()
  except UnicodeError as error:
    raise errors.CalmError(f"the prompt is not UTF-8: {error}") from error


def _mesh() -> config.Mesh:
  """Returns what --mesh says."""
  given = {}
  for part in _MESH.value.split(","):
    name, _, size = part.partition("=")
    number = size.removeprefix("-")
    known = name in ("data", "fsdp", "sequence", "tensor") and name not in given
    config.require(
      known and number.isdecimal() and len(number) < 10,
      f"--mesh has {part!r}: give sizes of data, fsdp, sequence, tensor, as data=2,fsdp=4",
    )
    given[name] = int(size)
  return config.Mesh(**{"fsdp": 1, **given})


class _Act:
  """One run of the command."""

  def __init__(self, common: dict[str, Any]):
    trained = loading.load(_WORKDIR.value)
    texts.require_writing(trained.run, f"{_WORKDIR.value} holds")
    self._trained, self._common = precision.WEIGHTS[_WEIGHTS.value](trained), common
    self._tokenizer = workdir.tokenizer(_WORKDIR.value, trained.origin)
    sampler = requests.Sampler(_RULE.value, _AT_LIMIT.value)
    self._decoder = texts.decoder(self._trained, sampler, _note)
    self.session = session.Session(self._decoder, self._tokenizer)
    # What all texts of a run share, and what one that goes on must share with it.
    self._told = {
      "rule": _RULE.value, "at_limit": _AT_LIMIT.value, "weights": _WEIGHTS.value,
      "step": trained.step,
    }  # fmt: skip

  def _request(self, wish: Mapping[str, Any]) -> requests.Request:
    tokens = tuple(self._tokenizer.encode(wish["prompt"]))
    return requests.Request(**{**wish, "prompt": tokens, "stop": tuple(wish["stop"])})

  def _write(self, wishes: list[dict[str, Any]], show=lambda row, piece: None) -> list[str]:
    """Writes a batch; returns a line of JSON for each text."""
    every = _EVERY.value or (1 if len(wishes) == 1 else 16)
    written = self.session.write([self._request(wish) for wish in wishes], every, show)
    return [
      prompts.line({**wish, **self._told}, found.record())
      for wish, found in zip(wishes, written, strict=True)
    ]

  def one_prompt(self, prompt: str) -> None:
    """Writes texts of one prompt to standard output: one as it comes, several when whole."""
    for begin in range(0, _NUM_TEXTS.value, _BATCH.value):
      numbers = range(begin, min(begin + _BATCH.value, _NUM_TEXTS.value))
      wishes = [{**self._common, "prompt": prompt, "number": number} for number in numbers]
      if len(wishes) == 1:
        self._stream(wishes[0])
        continue
      lines = self._write(wishes)
      self._keep(lines)
      for wish, line in zip(wishes, lines, strict=True):
        _note(f"--- text {wish['number'] + 1} of {_NUM_TEXTS.value}")
        _show(prompt + json.loads(line)["text"])

  def _stream(self, wish: dict[str, Any]) -> None:
    begun = False

    def show(row: int, piece: str) -> None:
      nonlocal begun
      # The prompt waits for the first piece, so that a note on it comes before both.
      _show(piece if begun else wish["prompt"] + piece, end="")
      begun = True

    try:
      self._keep(self._write([wish], show))
    finally:
      if begun:
        print(flush=True)

  def _keep(self, lines: list[str]) -> None:
    workdir.keep_samples(_WORKDIR.value, lines)

  def file(self, held: lease.Lease) -> None:
    """Writes the texts of a file of prompts, from where an earlier run stopped.

    Args:
      held: the output's, so that no other process writes to it.
    """
    wishes = prompts.read(_PROMPTS.value, self._common)
    for wish in wishes:  # All of them before the first is written.
      try:
        self._decoder.law.power(self._request(wish))
      except errors.CalmError as error:
        where = f"{_PROMPTS.value}, line {wish['number'] + 1}"
        raise errors.CalmError(f"{where}: {error}") from error
    done = prompts.written(_OUTPUT.value, [{**wish, **self._told} for wish in wishes])
    files.append(_OUTPUT.value, "")  # Tells now whether it can be written.
    if done:
      _note(f"{_OUTPUT.value} holds {done} of {len(wishes)} texts: going on")
    for begin in range(done, len(wishes), _BATCH.value):
      batch = wishes[begin : begin + _BATCH.value]
      lines = self._write(batch)
      held.require_held()
      files.append(_OUTPUT.value, "".join(lines))
      _note(f"{begin + len(batch)} of {len(wishes)} texts")

  def interactive(self) -> None:
    """Goes on from every line of standard input; Ctrl-C ends a text, the end of input all."""
    number, waiting = 0, ""
    while True:
      if sys.stdin.isatty():
        print("... " if waiting else "> ", end="", file=sys.stderr, flush=True)
      read = sys.stdin.buffer.readline()
      if not read:
        return
      try:
        line = waiting + read.decode().rstrip("\r\n")
      except UnicodeError as error:
        _note(f"error: the prompt is not UTF-8: {error}")
        continue
      waiting = line[:-1] + "\n" if line.endswith("\\") else ""
      if waiting:
        continue
      try:
        self._stream({**self._common, "prompt": line, "number": number})
      except KeyboardInterrupt:
        _note("stopped; Ctrl-D ends")
      except errors.CalmError as error:
        _note(f"error: {error}")
      number += 1


def main() -> None:
  if isinstance(sys.stdout, io.TextIOWrapper):  # What its encoding lacks is written out.
    sys.stdout.reconfigure(errors="backslashreplace")
  if not _WORKDIR.value:
    raise errors.CalmError("give --workdir=DIR, the folder of a language model's training run")
  config.require(
    bool(_PROMPTS.value) == bool(_OUTPUT.value), "--prompts=FILE and --output=FILE go together"
  )
  several = [name for name in ("prompt", "prompts", "interactive") if flags.FLAGS[name].value]
  config.require(len(several) < 2, f"--{' and --'.join(several)} can't be given together")
  common = {
    "temperature": _TEMPERATURE.value, "num_candidates": _NUM_CANDIDATES.value,
    "max_tokens": _MAX_TOKENS.value, "seed": _SEED.value, "stop": _STOP.value,
  }  # fmt: skip
  requests.Request(**{**common, "stop": tuple(_STOP.value)})
  output = _OUTPUT.value
  taken = lease.Lease(lease.of_file(output), f"--output={output}") if output else None
  with taken or contextlib.nullcontext() as held, jax.set_mesh(mesh_lib.build(_mesh())):
    act = _Act(common)
    if held:
      act.file(held)
    elif _INTERACTIVE.value:
      act.interactive()
    else:
      act.one_prompt(_read_prompt())
  if act.session.speed.patches:
    _note(act.session.speed.line())


if __name__ == "__main__":
  cli.run(main)
