"""Speed of the input: text to tokens by `prepare`, tokens to batches by the pipeline."""

import itertools
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import tokenizers

from calm_jax import errors
from calm_jax.data import pipeline, readers, sources, synthetic, tokenizer

CONTEXT, BATCH = 8192, 16
SECONDS = 5.0  # Duration of reading batches.
VOCAB = 32_768
TEXT_BYTES = 2**25
# Llama 3's pattern, which splits text before bytes are merged.
_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _read(connection: Any) -> None:
  """Reads batches of blocks at random positions on one core; sends tokens/s."""
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  store = synthetic.open_store(f"{synthetic.PREFIX}{VOCAB}")
  batches = pipeline.TrainingBatches(store, CONTEXT, BATCH, 0)
  for _ in range(5):
    next(batches)
  start, rows = time.perf_counter(), 0
  while time.perf_counter() - start < SECONDS:
    rows += len(next(batches)["tokens"])
  connection.send(rows * CONTEXT / (time.perf_counter() - start))


def _reading_rate() -> float:
  """Returns the tokens/s of `_read` in a process of its own."""
  context = multiprocessing.get_context("spawn")
  receiver, sender = context.Pipe()
  process = context.Process(target=_read, args=(sender,), daemon=True)
  process.start()
  sender.close()
  try:
    return receiver.recv()
  except EOFError as error:
    raise errors.CalmError("reading can't be measured: its process has died") from error
  finally:
    process.join()


def _texts() -> list[str]:
  """Returns documents of at least TEXT_BYTES in sum: the standard library, repeated."""
  _, spans = sources.find([sources.STDLIB])
  texts, size = [], 0
  for span in itertools.cycle(spans):
    for text in readers.documents(span, "text"):
      texts.append(str(text))
      size += len(texts[-1].encode())
    if size >= TEXT_BYTES:
      return texts
  raise AssertionError("cycle has no end")


def _llama_style(texts: list[str], path: str) -> None:
  """Trains a byte-level BPE of Llama 3's kind into a tokenizer.json."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
  split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated")
  byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=VOCAB,
    special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
    show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  model.train_from_iterator(texts, trainer)
  model.save(path)


def _write(texts: list[str], path: pathlib.Path) -> int:
  """Writes documents as JSON lines; returns the bytes of their text."""
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
  return sum(len(text.encode()) for text in texts)


def _prepare_seconds(source: pathlib.Path, model: str, workers: int) -> float:
  """Returns the seconds of one `prepare` command."""
  with tempfile.TemporaryDirectory(prefix="calm_jax_benchmark_") as folder:
    command = [sys.executable, "-m", "calm_jax.prepare", f"--input={source}", "--heldout=0.1"]
    command += [f"--output={folder}/tokens", f"--tokenizer={model}", f"--workers={workers}"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
  if done.returncode:
    raise errors.CalmError(f"prepare can't be measured: {done.stderr.strip().splitlines()[-1]}")
  return seconds


def _prepare_rates(root: pathlib.Path) -> list[dict[str, Any]]:
  """Returns `prepare`'s figures per tokenizer and number of workers.

  A second run over few texts measures the fixed time of a run, which the rates exclude.
  """
  texts = _texts()
  few_texts = texts[: max(64, len(texts) // 100)]
  size, few_bytes = _write(texts, root / "texts.jsonl"), _write(few_texts, root / "few.jsonl")
  tokenizer.train(texts[: len(texts) // 8], VOCAB // 4, str(root / "pieces.model"))
  _llama_style(texts[: len(texts) // 8], str(root / "llama.json"))
  workers = sorted({1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2})
  figures = []
  for name, file in (("SentencePiece", "pieces.model"), ("Llama 3's kind", "llama.json")):
    for count in workers:
      seconds_of_few, seconds = (
        _prepare_seconds(root / source, str(root / file), count)
        for source in ("few.jsonl", "texts.jsonl")
      )
      figures.append(
        {
          "tokenizer": name,
          "workers": count,
          "bytes": size,
          "seconds": seconds,
          "seconds_of_few": seconds_of_few,
          "bytes_per_second": (size - few_bytes) / (seconds - seconds_of_few),
        }
      )
  return figures


def measure() -> tuple[list[str], dict[str, Any]]:
  """Returns lines to print, and the figures: tokens/s and bytes/s, higher is better."""
  reading = _reading_rate()
  with tempfile.TemporaryDirectory(prefix="calm_jax_benchmark_") as folder:
    preparing = _prepare_rates(pathlib.Path(folder))
  lines = [
    f"reading: {reading / 1e6:.1f} M tokens/s of one process on one core, batches of {BATCH} "
    f"blocks of {CONTEXT:,} tokens at random places of a token store"
  ]
  for row in preparing:
    lines.append(
      f"prepare, {row['tokenizer']}, {row['workers']} worker{'s' * (row['workers'] > 1)}: "
      f"{row['bytes_per_second'] / 1e6:.1f} MB/s of text beyond the {row['seconds_of_few']:.1f} s "
      "that little text takes"
    )
  return lines, {"reading_tokens_per_second": reading, "preparing": preparing}
