"""Text -> token store: `python -m calm_jax.prepare`.

  python -m calm_jax.prepare --input='corpus/*.jsonl.gz' --output=DIR --tokenizer=train:32768

If a run is killed, the same command resumes after its finished parts.
"""

import dataclasses
import functools
import hashlib
import os
import sys
import time
from collections.abc import Sequence

from absl import flags
from etils import epath

from calm_jax import cli, errors, files, lease
from calm_jax.data import corpus as corpus_lib
from calm_jax.data import holdout, manifest, progress, readers, sources, store, store_writer
from calm_jax.data import parts as parts_lib
from calm_jax.data import plan as plan_lib
from calm_jax.data import tokenizer as tokenizer_lib

TRAIN = "train:"

_MIN_PART_BYTES = 2**20
_MAX_PARTS = 4096
_FEW_TOKENS = 20 * 256  # A split should hold 20 blocks of the quickstart's context.

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
_SKIP_BAD_LINES = flags.DEFINE_boolean(
  "skip_bad_lines", False, "Count bad lines and leave them out; by default they are errors."
)
_APPEND_EOS = flags.DEFINE_boolean("append_eos", True, "End every document with EOS.")
_HELDOUT = flags.DEFINE_float(
  "heldout",
  0.02,
  "Share of documents to hold out, chosen by a hash of their text. With fewer than 100 documents, "
  "or if a split would be empty, this share of the text at its end is held out instead. 0 holds "
  "nothing out.",
)
_WORKERS = flags.DEFINE_integer("workers", 0, "Number of processes; 0 for the number of cores.")
_EOS_TOKEN = flags.DEFINE_string(
  "eos_token", "", "Name of the token that ends a document; by default a well-known name."
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """The values of the flags; `workers` changes only the running time."""

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
  """Writes the store that `settings` describe, unless it exists, and returns it.

  Raises:
    CalmError: if the input is bad, the output can't be written or holds something else, or
      another process is preparing it.
  """
  _check(settings)
  names, spans = sources.find(settings.input)
  plan = _plan(settings, names, spans)
  output = settings.output
  finished = plan_lib.finished_store(output, plan)
  if finished is None or plan_lib.has_work(output):
    with lease.Lease(lease.of_folder(output), f"--output={output}") as output_lease:
      finished = plan_lib.finished_store(output, plan)  # Another process may have finished it.
      if finished is None:
        return _make(settings, names, spans, plan, output_lease)
      plan_lib.remove_work(output)  # The run that wrote it was killed before its last step.
  _say(f"{output} exists already, made from the same input with the same settings")
  return finished


def _make(
  settings: Settings,
  names: Sequence[str],
  spans: Sequence[readers.Span],
  plan: dict[str, str],
  output_lease: lease.Lease,
) -> store.TokenStore:
  """Writes the store, using the finished parts of an earlier attempt, and returns it."""
  began = time.monotonic()
  try:
    work = plan_lib.work_folder(settings.output, plan, _say_removed)
    part_bytes = max(_MIN_PART_BYTES, sum(span.size for span in spans) // _MAX_PARTS)
    parts = sources.split(spans, part_bytes)
    corpus = corpus_lib.Corpus(parts, settings.text_field, settings.skip_bad_lines)
    division = _division(corpus, settings.heldout)
    tokenizer = _tokenizer(settings, work, corpus, division)
    job = parts_lib.PartJob(
      directory=str(work),
      tokenizer=tokenizer.path,
      tokenizer_sha256=tokenizer.sha256,
      eos_id=tokenizer.eos_id,
      text_field=settings.text_field,
      skip_bad_lines=settings.skip_bad_lines,
      append_eos=settings.append_eos,
      division=division,
    )
    finished_parts = _make_parts(job, parts, settings.workers or os.cpu_count() or 1, output_lease)
    sources.require_unchanged(spans)
    token_store = _write(settings, job, tokenizer, finished_parts, names, plan, output_lease)
    plan_lib.remove_work(settings.output)
  except OSError as error:
    raise errors.CalmError(f"can't write {settings.output}: {error}") from error
  _summarize(token_store, time.monotonic() - began)
  _warn_of_small_splits(token_store)
  return token_store


def _check(settings: Settings) -> None:
  """Raises CalmError for flags that are wrong whatever the input is."""
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
      f"--output={settings.output}: the path of a token store can't hold a backslash, which "
      "TensorStore reads as a slash; give another"
    )
  if settings.tokenizer.startswith(TRAIN):
    if not settings.tokenizer.removeprefix(TRAIN).isdecimal():
      raise errors.CalmError(
        f"--tokenizer={settings.tokenizer} names no vocabulary size, as train:1024 does"
      )
    if settings.eos_token:
      raise errors.CalmError("--eos_token is for a tokenizer's file; a trained one has </s>")


def _plan(
  settings: Settings, names: Sequence[str], spans: Sequence[readers.Span]
) -> dict[str, str]:
  """Returns everything that determines the bytes of the store, as text that can be compared."""
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


def _division(corpus: corpus_lib.Corpus, share: float) -> holdout.Division:
  """Returns the division into splits; prints a line if the end of the text is held out."""
  division = corpus.divide(share)
  if division.heldout_by == holdout.END:
    few = division.documents < holdout.FEW_DOCUMENTS
    reason = f"fewer than {holdout.FEW_DOCUMENTS}" if few else "which leave a split empty"
    _say(
      f"holding out the last {share:.2%} of the text, not documents by their hash: there are "
      f"{division.documents:,} documents, {reason}"
    )
  return division


def _tokenizer(
  settings: Settings, work: epath.Path, corpus: corpus_lib.Corpus, division: holdout.Division
) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer of --tokenizer, or one trained in this run or an earlier attempt."""
  if not settings.tokenizer.startswith(TRAIN):
    return tokenizer_lib.load(settings.tokenizer, settings.eos_token)
  path, sum_path = work / "tokenizer.model", work / "tokenizer.sum.json"
  try:
    if files.read_json(sum_path) == {"sha256": files.digest(path)}:
      return tokenizer_lib.load(str(path))
  except errors.CalmError:
    pass  # There is none yet, or it is damaged: train it.
  _say(f"training a tokenizer: {settings.tokenizer}")
  vocab_size = int(settings.tokenizer.removeprefix(TRAIN))
  trained = tokenizer_lib.train(corpus.sample(division), vocab_size, str(path))
  files.write(sum_path, files.to_json({"sha256": trained.sha256}))
  return trained


def _make_parts(
  job: parts_lib.PartJob,
  parts: Sequence[tuple[readers.Span, ...]],
  workers: int,
  output_lease: lease.Lease,
) -> list[parts_lib.Part]:
  """Writes the missing and damaged parts and returns all parts, in order."""
  part_of = {number: parts_lib.read_part(job, number, spans) for number, spans in enumerate(parts)}
  missing = {number: parts[number] for number, part in part_of.items() if part is None}
  if len(missing) < len(parts):
    _say(f"resuming: {len(parts) - len(missing)} of {len(parts)} parts are finished")
  size_of = {number: sum(span.num_bytes for span in spans) for number, spans in missing.items()}
  progress_bar = progress.Progress(sum(size_of.values()), _say)

  def on_done(number: int, part: parts_lib.Part) -> None:
    output_lease.require_held()
    part_of[number] = part
    progress_bar.add(size_of[number])

  try:
    parts_lib.make_parts(job, missing, workers, on_done)
  finally:
    progress_bar.close()
  return [part for part in part_of.values() if part is not None]


def _write(
  settings: Settings,
  job: parts_lib.PartJob,
  tokenizer: tokenizer_lib.Tokenizer,
  finished_parts: Sequence[parts_lib.Part],
  names: Sequence[str],
  plan: dict[str, str],
  output_lease: lease.Lease,
) -> store.TokenStore:
  """Writes the store from its parts and returns it."""
  dtype = store_writer.token_dtype(tokenizer.vocab_size)
  total = functools.reduce(lambda a, b: a + b, (part.counts for part in finished_parts))
  if not total["train.tokens"]:
    raise errors.CalmError(f"{tokenizer.path} encodes the training text to no tokens")
  provenance = store_writer.Provenance(
    sources=[
      manifest.Source(name, total[f"{i}.bytes"], total[f"{i}.documents"])
      for i, name in enumerate(names)
    ],
    appends_eos=settings.append_eos,
    heldout=settings.heldout,
    heldout_by=job.division.heldout_by,
    skipped_lines=total[parts_lib.SKIPPED],
    plan=plan,
  )
  contents = {
    split: parts_lib.read_split(job, finished_parts, split, dtype) for split in manifest.SPLITS
  }
  return store_writer.write(
    settings.output, tokenizer, contents, provenance, output_lease.require_held
  )


def _summarize(token_store: store.TokenStore, seconds: float) -> None:
  """Prints the sizes of a store and the seconds that its preparation took."""
  facts = token_store.manifest
  size = sum(source.bytes for source in facts.sources)
  tokens = sum(split.tokens for split in facts.splits.values())
  documents = sum(source.documents for source in facts.sources)
  heldout = facts.splits["heldout"]
  skipped = f", {facts.skipped_lines} bad lines skipped" if facts.skipped_lines else ""
  _say(
    f"{token_store.path}: {documents:,} documents{skipped}, {size / 1e6:.1f} MB of text, "
    f"{tokens:,} tokens, {size / tokens:.3f} bytes a token; held out {heldout.documents:,} "
    f"documents, {heldout.tokens / tokens:.2%} of tokens; {seconds:.1f} s; store {token_store.hash}"
  )


def _warn_of_small_splits(token_store: store.TokenStore) -> None:
  """Prints a warning for each split that is too small for meaningful figures."""
  for split in manifest.SPLITS:
    tokens = token_store.num_tokens(split)
    requested = split == "train" or token_store.manifest.heldout
    if requested and tokens < _FEW_TOKENS:
      _say(
        f"warning: the {split} split holds only {tokens:,} tokens, fewer than 20 blocks of 256: "
        "give more text" + (" or a larger --heldout" if split == "heldout" else "")
      )


def _say(line: str) -> None:
  print(f"prepare: {line}", file=sys.stderr, flush=True)


def _say_removed(folder: epath.Path) -> None:
  _say(f"removing the parts of an unfinished run with other settings: {folder}")


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
