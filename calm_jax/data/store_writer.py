"""Tokens -> token store: writes the arrays, the tokenizer's copy, the plan and the manifest.

See `data.store` for the files of a store.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from calm_jax import errors, files
from calm_jax.data import arrays, store
from calm_jax.data import manifest as manifest_lib
from calm_jax.data import tokenizer as tokenizer_lib
from calm_jax.data.manifest import MANIFEST, SPLITS


@dataclasses.dataclass(frozen=True)
class SplitContent:
  """A split to be written.

  Attributes:
    num_tokens, num_documents: sizes of the split.
    tokens: its tokens, in blocks of any size.
    lengths: the length of each document in tokens, in blocks of any size.
  """

  num_tokens: int
  num_documents: int
  tokens: Iterable[np.ndarray]
  lengths: Iterable[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Provenance:
  """How a store was made, as its manifest records it.

  Attributes:
    sources: the inputs.
    appends_eos: whether EOS ends every document.
    heldout: the requested held-out share.
    heldout_by: what was held out; see `data.holdout`.
    skipped_lines: number of bad lines left out.
    plan: what the store was made from, for plan.json; None to write no plan.
  """

  sources: Sequence[manifest_lib.Source]
  appends_eos: bool
  heldout: float
  heldout_by: str
  skipped_lines: int = 0
  plan: Mapping[str, Any] | None = None


def token_dtype(vocab_size: int) -> np.dtype:
  """Returns the smallest type that holds the tokens of a vocabulary."""
  return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write(
  path: str,
  tokenizer: tokenizer_lib.Tokenizer,
  contents: Mapping[str, SplitContent],
  provenance: Provenance,
  proceed: Callable[[], None] = lambda: None,
) -> store.TokenStore:
  """Writes a store, reads it back, writes its manifest last, and returns it.

  Args:
    path: a folder or a bucket's URL.
    tokenizer: the tokenizer that produced the tokens; its file is copied.
    contents: split name -> its content.
    provenance: how the store was made.
    proceed: called before each split and the manifest; raises to stop writing.

  Raises:
    CalmError: if the store can't be written, or reads back differently.
  """
  dtype = token_dtype(tokenizer.vocab_size)
  try:
    _clear(path)
    info = _copy_tokenizer(path, tokenizer)
    plan = _write_plan(path, provenance.plan)
    splits = {}
    for name in SPLITS:
      proceed()
      splits[name] = _write_split(path, name, contents[name], dtype)
    arrays.sync_folders(path)
    manifest = manifest_lib.Manifest(
      tokenizer=info,
      appends_eos=provenance.appends_eos,
      dtype=dtype.name,
      heldout=provenance.heldout,
      heldout_by=provenance.heldout_by,
      skipped_lines=provenance.skipped_lines,
      sources=tuple(provenance.sources),
      splits=splits,
      plan=plan,
    )
    proceed()
    files.write(epath.Path(path) / MANIFEST, manifest.to_json())
  except errors.CalmError:
    raise
  except (OSError, ValueError) as error:  # TensorStore reports a full disk as a ValueError.
    reason = " ".join(str(error).split())
    raise errors.CalmError(f"can't write the token store {path}: {reason}") from error
  return store.TokenStore(path, manifest)


def _clear(path: str) -> None:
  """Makes the folder of a store and removes the splits of an interrupted attempt."""
  root = epath.Path(path)
  root.mkdir(parents=True, exist_ok=True)
  for split in (root / name for name in SPLITS):
    if split.exists():
      split.rmtree()


def _copy_tokenizer(path: str, tokenizer: tokenizer_lib.Tokenizer) -> manifest_lib.TokenizerInfo:
  """Copies a tokenizer's file into a store; raises CalmError if the file has changed."""
  name = f"tokenizer{epath.Path(tokenizer.path).suffix}"
  content = files.read(tokenizer.path)
  if hashlib.sha256(content).hexdigest() != tokenizer.sha256:
    raise errors.CalmError(f"{tokenizer.path} changed while it was used: run prepare again")
  files.write(epath.Path(path) / name, content)
  return manifest_lib.TokenizerInfo(name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eos_id)


def _write_plan(path: str, plan: Mapping[str, Any] | None) -> str:
  """Writes plan.json and returns its SHA-256, empty without a plan."""
  if plan is None:
    return ""
  text = files.to_json(plan)
  files.write(epath.Path(path) / store.PLAN, text)
  return hashlib.sha256(text.encode()).hexdigest()


def _write_split(
  path: str, name: str, content: SplitContent, dtype: np.dtype
) -> manifest_lib.Split:
  """Writes the two arrays of a split and returns its sizes and sums."""
  tokens, documents = content.num_tokens, content.num_documents
  return manifest_lib.Split(
    tokens,
    documents,
    arrays.write(path, f"{name}/tokens", tokens, dtype, content.tokens),
    arrays.write(
      path, f"{name}/offsets", documents + 1, store.OFFSET_DTYPE, _starts(content.lengths)
    ),
  )


def _starts(lengths: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """Yields the start of each document, then the end of the last, from document lengths."""
  end = np.zeros(1, np.int64)
  yield end
  for block in lengths:
    starts = end + np.cumsum(block, dtype=np.int64)
    yield starts
    end = starts[-1:] if len(starts) else end
