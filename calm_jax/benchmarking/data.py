"""Speed of the input: text to tokens by `prepare`, and tokens to batches."""

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
from calm_jax.data import pipeline, sources, synthetic, tokenizer

CONTEXT, BATCH = 8192, 16
SECONDS = 5.0  # Of reading.
VOCAB = 32_768
TEXT_BYTES = 2**25
# As Llama 3 splits text before it merges bytes.
_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _read(connection: Any) -> None:
  """A process on one core: tells tokens/s of batches of blocks at random places."""
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


def _reading() -> float:
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe()
  process = context.Process(target=_read, args=(theirs,), daemon=True)
  process.start()
  theirs.close()
  try:
    return ours.recv()
  except EOFError as error:
    raise errors.CalmError("reading can't be measured: its process ended") from error
  finally:
    process.join()


def _texts() -> list[str]:
  """Returns documents of at least TEXT_BYTES: the standard library, again and again."""
  _, spans = sources.find([sources.STDLIB])
  texts, size = [], 0
  for span in itertools.cycle(spans):
    for text in sources.documents(span, "text"):
      texts.append(str(text))
      size += len(texts[-1].encode())
    if size >= TEXT_BYTES:
      return texts
  raise AssertionError("cycle has no end")


def _llama_style(texts: list[str], path: str) -> None:
  """Trains a byte-level BPE, of Llama 3's kind."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
    tokenizers.pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated"),
    tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])  # fmt: skip
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=VOCAB, special_tokens=["<|begin_of_text|>", "<|end_of_text|>"], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )  # fmt: skip
  model.train_from_iterator(texts, trainer)
  model.save(path)


def _write(texts: list[str], path: pathlib.Path) -> int:
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
  return sum(len(text.encode()) for text in texts)


def _prepare_seconds(source: pathlib.Path, model: str, workers: int) -> float:
  with tempfile.TemporaryDirectory(prefix="calm_jax_benchmark_") as folder:
    command = [
      sys.executable, "-m", "calm_jax.prepare", f"--input={source}", f"--output={folder}/tokens",
      f"--tokenizer={model}", f"--workers={workers}", "--heldout=0.1",
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
  if done.returncode:
    raise errors.CalmError(f"prepare can't be measured: {done.stderr.strip().splitlines()[-1]}")
  return seconds


def measure() -> tuple[list[str], dict[str, Any]]:
  """Returns lines to be read, and the figures: tokens/s and MB/s, higher is better."""
  reading = _reading()
  lines = [
    f"reading: {reading / 1e6:.1f} M tokens/s of one process on one core, batches of {BATCH} "
    f"blocks of {CONTEXT:,} tokens at random places of a token store"
  ]
  preparing = []
  texts = _texts()
  workers = sorted({1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2})
  with tempfile.TemporaryDirectory(prefix="calm_jax_benchmark_") as folder:
    root = pathlib.Path(folder)
    few = texts[: max(64, len(texts) // 100)]
    size, small = _write(texts, root / "texts.jsonl"), _write(few, root / "few.jsonl")
    tokenizer.train(texts[: len(texts) // 8], VOCAB // 4, str(root / "pieces.model"))
    _llama_style(texts[: len(texts) // 8], str(root / "llama.json"))
    for name, file in (("SentencePiece", "pieces.model"), ("Llama 3's kind", "llama.json")):
      for count in workers:
        taken = [
          _prepare_seconds(root / source, str(root / file), count)
          for source in ("few.jsonl", "texts.jsonl")
        ]
        rate = (size - small) / (taken[1] - taken[0])
        preparing.append({
          "tokenizer": name, "workers": count, "bytes": size, "seconds": taken[1],
          "seconds_of_few": taken[0], "bytes_per_second": rate,
        })  # fmt: skip
        lines.append(
          f"prepare, {name}, {count} worker{'s' * (count > 1)}: {rate / 1e6:.1f} MB/s of text "
          f"beyond the {taken[0]:.1f} s that little text takes"
        )
  return lines, {"reading_tokens_per_second": reading, "preparing": preparing}
