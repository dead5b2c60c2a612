"""Text -> token store.

  python -m calm_jax.prepare --input='corpus/*.jsonl.gz' --output=DIR --tokenizer=train:32768

Killed and run again with the same flags, it goes on after the parts it finished.
"""

import dataclasses
import functools
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence

import tqdm
from absl import flags
from etils import epath

from calm_jax import cli, errors, files, lease, sealed_json
from calm_jax.data import holdout, manifest, sources, store
from calm_jax.data import parts as parts_lib
from calm_jax.data import tokenizer as tokenizer_lib

TRAIN = "train:"

_WORK = "unfinished"  # The folder of parts, below --output.
_MIN_PART_BYTES = 2**20
_MAX_PARTS = 4096
_SAMPLE_BYTES = 2**26  # Text that a tokenizer is trained on, at most.
_LINE_SECONDS = 10.0  # Between lines of progress where there is no terminal.
_FEW_TOKENS = 20 * 256  # Blocks that a split should hold, of the quickstart's context.

_INPUT = flags.DEFINE_list(
  "input",
  None,
  "Globs of files or folders, or stdlib: for the Python standard library.",
  required=True,
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the token store.", required=True)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  None,
  "SentencePiece .model, Hugging Face tokenizer.json, or train:VOCAB.",
  required=True,
)
_TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Field of JSON lines, column of Parquet.")
_SKIP_BAD_LINES = flags.DEFINE_boolean("skip_bad_lines", False, "Count bad lines and go on.")
_APPEND_EOS = flags.DEFINE_boolean("append_eos", True, "End every document with EOS.")
_HELDOUT = flags.DEFINE_float(
  "heldout",
  0.02,
  "Share of documents held out, by their hash; of fewer than 100 documents, or where none falls "
  "into a split, the share of the text at its end. 0 holds nothing out.",
)
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0 for the number of cores.")
_EOS_TOKEN = flags.DEFINE_string("eos_token", "", "Token that ends a document; empty: look it up.")


@dataclasses.dataclass(frozen=True)
class Settings:
  """The flags; `workers` changes only the time it takes."""

  input: tuple[str, ...]
  output: str
  tokenizer: str
  text_field: str = "text"
  skip_bad_lines: bool = False
  append_eos: bool = True
  heldout: float = 0.02
  workers: int = 0
  eos_token: str = ""


def prepare(settings: Settings) -> store.TokenStore:
  """Writes the store that `settings` describe, unless it is there, and returns it.

  Raises:
    CalmError: if the input is bad, the output can't be written or holds something else,
      or while another process prepares it.
  """
  _check(settings)
  names, spans = sources.find(settings.input)
  plan = _plan(settings, names, spans)
  finished = _finished(settings.output, plan)
  if finished is None or (epath.Path(settings.output) / _WORK).exists():
    output = settings.output
    with lease.Lease(lease.of_folder(output), f"--output={output}") as held:
      finished = _finished(output, plan)  # Now that nobody writes there any more.
      if finished is None:
        return _make(settings, names, spans, plan, held)
      _remove_work(output)  # The run that wrote it was killed on its last step.
  _say(f"{settings.output} is there already, made from the same input with the same settings")
  return finished


def _make(
  settings: Settings,
  names: Sequence[str],
  spans: Sequence[sources.Span],
  plan: dict[str, str],
  held: lease.Lease,
) -> store.TokenStore:
  """Writes the store, after the parts that an attempt before finished, and returns it."""
  began = time.monotonic()
  try:
    work = _work_folder(settings.output, plan)
    part_bytes = max(_MIN_PART_BYTES, sum(span.size for span in spans) // _MAX_PARTS)
    parts = sources.split(spans, part_bytes)
    division = _division(settings, parts)
    tokenizer = _tokenizer(settings, work, parts, division)
    job = parts_lib.Job(
      directory=str(work),
      tokenizer=tokenizer.path,
      tokenizer_sha256=tokenizer.sha256,
      eos_id=tokenizer.eos_id,
      text_field=settings.text_field,
      skip_bad_lines=settings.skip_bad_lines,
      append_eos=settings.append_eos,
      division=division,
    )
    made = _make_parts(job, parts, settings.workers or os.cpu_count() or 1, held)
    sources.require_unchanged(spans)
    written = _write(settings, job, tokenizer, made, names, plan, held)
    _remove_work(settings.output)
  except OSError as error:
    raise errors.CalmError(f"can't write {settings.output}: {error}") from error
  _summarize(written, time.monotonic() - began)
  _warn_of_little(written)
  return written


def _check(settings: Settings) -> None:
  if not 0 <= settings.heldout < 1:
    raise errors.CalmError(
      f"--heldout={settings.heldout} is not in [0, 1): it is a share of documents, 0 for none"
    )
  if settings.workers < 0:
    raise errors.CalmError(f"--workers={settings.workers} is negative")
  if not settings.output or not all(settings.input) or not settings.input:
    raise errors.CalmError("--input and --output must not be empty")
  if files.is_local(settings.output) and "\\" in files.absolute(settings.output):
    raise errors.CalmError(
      f"--output={settings.output}: a token store can't lie in a path that holds a backslash, "
      "which TensorStore reads as a slash; give another"
    )
  if settings.tokenizer.startswith(TRAIN):
    if not settings.tokenizer.removeprefix(TRAIN).isdecimal():
      raise errors.CalmError(f"--tokenizer={settings.tokenizer} names no size, as train:1024 does")
    if settings.eos_token:
      raise errors.CalmError("--eos_token is for a tokenizer's file; a trained one has </s>")


def _plan(
  settings: Settings, names: Sequence[str], spans: Sequence[sources.Span]
) -> dict[str, str]:
  """Returns what the bytes of the store follow from, in words that can be compared."""
  stamps = hashlib.sha256(repr([dataclasses.astuple(span) for span in spans]).encode())
  tokenizer = settings.tokenizer
  if not tokenizer.startswith(TRAIN):
    tokenizer = tokenizer_lib.load(tokenizer, settings.eos_token).hash
  return {
    "format_version": str(manifest.FORMAT_VERSION),
    "input": ",".join(names),
    "files": f"{len(spans)} files, {sum(span.size for span in spans)} bytes, "
    f"names and times {stamps.hexdigest()[:16]}",
    "tokenizer": tokenizer,
    "eos_token": settings.eos_token,
    "text_field": settings.text_field,
    "skip_bad_lines": str(settings.skip_bad_lines),
    "append_eos": str(settings.append_eos),
    "heldout": str(settings.heldout),
  }


def _finished(output: str, plan: dict[str, str]) -> store.TokenStore | None:
  """Returns the whole store at `output` if it was made by this plan, None if there is none.

  Raises:
    CalmError: if it was made by another plan, or is damaged.
  """
  found = manifest.read(output)
  if found is None:
    return None
  path = epath.Path(output) / store.PLAN
  stored = files.read_json(path)
  store.require_digest(path, found.plan)
  differing = [
    f"{name} ({stored.get(name, 'unknown')} there, {value} now)"
    for name, value in plan.items()
    if stored.get(name) != value
  ]
  if differing:
    raise errors.CalmError(
      f"{output} holds a token store that differs in {'; '.join(differing)}: give another "
      "--output, or remove that folder"
    )
  return store.TokenStore.open(output)


def _work_folder(output: str, plan: dict[str, str]) -> epath.Path:
  """Makes the folder for the parts of this plan, and removes those of other plans."""
  root = epath.Path(output) / _WORK
  work = root / sealed_json.digest(plan)[:16]
  work.mkdir(parents=True, exist_ok=True)
  for other in root.iterdir():
    if other.name != work.name:
      _say(f"removing the parts of an unfinished run with other settings: {other}")
      other.rmtree()
  return work


def _remove_work(output: str) -> None:
  root = epath.Path(output) / _WORK
  try:
    if root.exists():
      root.rmtree()
  except OSError as error:
    raise errors.CalmError(f"can't remove {root}: {error}") from error


def _division(settings: Settings, parts: Sequence[tuple[sources.Span, ...]]) -> holdout.Division:
  """Returns what is held out, and says so where it is not documents by their hash."""
  readers = [functools.partial(_texts, settings, part) for part in parts]
  division = holdout.decide(readers, settings.heldout)
  if division.by == holdout.END:
    few = division.documents < holdout.FEW_DOCUMENTS
    reason = f"fewer than {holdout.FEW_DOCUMENTS}" if few else "of which none falls into a split"
    _say(
      f"held out is the last {settings.heldout:.2%} of the text, and not whole documents by their "
      f"hash: there are {division.documents:,}, {reason}"
    )
  return division


def _tokenizer(
  settings: Settings,
  work: epath.Path,
  parts: Sequence[tuple[sources.Span, ...]],
  division: holdout.Division,
) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer given, or one trained in this run or by an attempt before."""
  if not settings.tokenizer.startswith(TRAIN):
    return tokenizer_lib.load(settings.tokenizer, settings.eos_token)
  path, whole = work / "tokenizer.model", work / "tokenizer.sum.json"
  try:
    if files.read_json(whole) == {"sha256": files.digest(path)}:
      return tokenizer_lib.load(str(path))
  except errors.CalmError:
    pass  # None is there yet, or it is damaged: it is trained anew.
  _say(f"training a tokenizer: {settings.tokenizer}")
  vocab_size = int(settings.tokenizer.removeprefix(TRAIN))
  sample = _sample(settings, parts, division)
  trained = tokenizer_lib.train(sample, vocab_size, str(path))
  files.write(whole, files.to_json({"sha256": trained.sha256}))
  return trained


def _sample(
  settings: Settings, parts: Sequence[tuple[sources.Span, ...]], division: holdout.Division
) -> Iterator[str]:
  """Yields text that is not held out, at most _SAMPLE_BYTES, from all over the corpus."""
  sizes = [sum(span.num_bytes for span in part) for part in parts]
  share = min(1.0, _SAMPLE_BYTES / max(1, sum(sizes)))
  for part, size in enumerate(sizes):
    left = share * size
    for number, document in enumerate(_texts(settings, parts[part])):
      for split, text in division.of(part, number, document):
        if split == "train":
          yield text[: int(left) + 1]
          left -= len(text.encode())
      if left <= 0:
        break


def _texts(settings: Settings, spans: Sequence[sources.Span]) -> Iterator[str]:
  """Yields the documents of a part, in order."""
  for span in spans:
    for item in parts_lib.good_documents(span, settings.text_field, settings.skip_bad_lines):
      if isinstance(item, str):
        yield item


def _make_parts(
  job: parts_lib.Job,
  parts: Sequence[tuple[sources.Span, ...]],
  workers: int,
  held: lease.Lease,
) -> list[parts_lib.Part]:
  """Makes the parts that are missing or damaged and returns all, in order."""
  made = {part: parts_lib.read_part(job, part, spans) for part, spans in enumerate(parts)}
  missing = {part: parts[part] for part, found in made.items() if found is None}
  if len(missing) < len(parts):
    _say(f"going on: {len(parts) - len(missing)} of {len(parts)} parts are there")
  size_of = {part: sum(span.num_bytes for span in spans) for part, spans in missing.items()}
  progress = _Progress(sum(size_of.values()))

  def on_done(part: int, found: parts_lib.Part) -> None:
    held.require_held()
    made[part] = found
    progress.add(size_of[part])

  try:
    parts_lib.make_parts(job, missing, workers, on_done)
  finally:
    progress.close()
  return [found for found in made.values() if found is not None]


def _write(
  settings: Settings,
  job: parts_lib.Job,
  tokenizer: tokenizer_lib.Tokenizer,
  made: Sequence[parts_lib.Part],
  names: Sequence[str],
  plan: dict[str, str],
  held: lease.Lease,
) -> store.TokenStore:
  dtype = store.token_dtype(tokenizer.vocab_size)
  total = functools.reduce(lambda a, b: a + b, (part.counts for part in made))
  if not total["train.tokens"]:
    raise errors.CalmError(f"{tokenizer.path} makes no token of the training text")
  return store.write(
    settings.output,
    tokenizer,
    {split: parts_lib.read_split(job, made, split, dtype) for split in manifest.SPLITS},
    [
      manifest.Source(name, total[f"{i}.bytes"], total[f"{i}.documents"])
      for i, name in enumerate(names)
    ],
    appends_eos=settings.append_eos,
    heldout=settings.heldout,
    heldout_by=job.division.by,
    skipped_lines=total[parts_lib.SKIPPED],
    plan=plan,
    proceed=held.require_held,
  )


class _Progress:
  """Bytes of source read so far: a bar on a terminal, elsewhere a line now and then."""

  def __init__(self, total: int):
    self._total, self._done, self._began = total, 0, time.monotonic()
    self._shown = self._began
    terminal = sys.stderr.isatty()
    self._bar = tqdm.tqdm(total=total, unit="B", unit_scale=True) if terminal else None

  def add(self, size: int) -> None:
    """Counts `size` more bytes."""
    self._done += size
    now = time.monotonic()
    if self._bar is not None:
      self._bar.update(size)
    elif now - self._shown > _LINE_SECONDS:
      self._shown = now
      rate = self._done / (now - self._began) / 1e6
      share = self._done / max(1, self._total)
      _say(f"{share:.0%} of {self._total / 1e6:.1f} MB, {rate:.1f} MB/s")

  def close(self) -> None:
    """Ends the bar and tells the speed of what was read."""
    seconds = time.monotonic() - self._began
    if self._bar is not None:
      self._bar.close()
    if not self._done:
      return
    _say(
      f"read {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB in {seconds:.1f} s, "
      f"{self._done / 1e6 / max(seconds, 1e-3):.1f} MB/s"
    )


def _summarize(written: store.TokenStore, seconds: float) -> None:
  found = written.manifest
  size = sum(source.bytes for source in found.sources)
  tokens = sum(split.tokens for split in found.splits.values())
  documents = sum(source.documents for source in found.sources)
  heldout = found.splits["heldout"]
  skipped = f", {found.skipped_lines} bad lines skipped" if found.skipped_lines else ""
  _say(
    f"{written.path}: {documents:,} documents{skipped}, {size / 1e6:.1f} MB of text, "
    f"{tokens:,} tokens, {size / tokens:.3f} bytes a token; held out {heldout.documents:,} "
    f"documents, {heldout.tokens / tokens:.2%} of tokens; {seconds:.1f} s; store {written.hash}"
  )


def _warn_of_little(written: store.TokenStore) -> None:
  """Says which splits are too small to tell much."""
  for split in manifest.SPLITS:
    tokens = written.num_tokens(split)
    asked = split == "train" or written.manifest.heldout
    if asked and tokens < _FEW_TOKENS:
      _say(
        f"warning: the {split} split holds only {tokens:,} tokens, fewer than 20 blocks of 256: "
        "give more text" + (" or a larger --heldout" if split == "heldout" else "")
      )


def _say(line: str) -> None:
  print(f"prepare: {line}", file=sys.stderr, flush=True)


def main() -> None:
  """Runs `prepare` on the flags."""
  prepare(
    Settings(
      input=tuple(_INPUT.value),
      output=_OUTPUT.value,
      tokenizer=_TOKENIZER.value,
      text_field=_TEXT_FIELD.value,
      skip_bad_lines=_SKIP_BAD_LINES.value,
      append_eos=_APPEND_EOS.value,
      heldout=_HELDOUT.value,
      workers=_WORKERS.value,
      eos_token=_EOS_TOKEN.value,
    )
  )


if __name__ == "__main__":
  cli.run(main)
