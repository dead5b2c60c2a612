"""Named damage to a token store, finished or not."""

import json
import pathlib
from collections.abc import Callable

import numpy as np
import tensorstore

from calm_jax.data import store as store_lib
from harm import specimens
from harm.targets import edit, fifo, nested, replace, target


def array(place: specimens.Place, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
  """Rewrites an array of a store, with valid checksums of its chunks."""
  path = f"{place.case}/{name}/"
  opened = tensorstore.open(
    {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}, open=True
  ).result()
  opened.write(change(np.asarray(opened.read().result()))).result()


@target("store", "read")
def manifest_bytes(place):
  """The manifest counts one more byte of text."""
  path = place.case / store_lib.MANIFEST
  values = json.loads(path.read_text())
  values["sources"][0]["bytes"] += 1
  path.write_text(json.dumps(values))


@target("store", "read", "train")
def manifest_eos(place):
  """The manifest names another EOS token."""
  edit(place.case / store_lib.MANIFEST, tokenizer__eos_id=7)


@target("store", "read")
def manifest_appends_eos(place):
  """The manifest says that no EOS ends a document."""
  edit(place.case / store_lib.MANIFEST, appends_eos=False)


@target("store", "read")
def manifest_checksum(place):
  """The manifest has another sum of the training tokens."""
  edit(place.case / store_lib.MANIFEST, splits__train__checksum="0" * 16)


@target("store", "read", "prepare")
def manifest_empty_object(place):
  """The manifest is {}."""
  (place.case / store_lib.MANIFEST).write_text("{}")


@target("store", "read", "prepare")
def manifest_list(place):
  """The manifest is a list."""
  (place.case / store_lib.MANIFEST).write_text("[1]")


@target("store", "read", "prepare")
def manifest_nested(place):
  """The manifest is nested 100,000 deep."""
  nested(place.case / store_lib.MANIFEST)


@target("store", "read")
def manifest_fifo(place):
  """The manifest is a pipe."""
  fifo(place.case / store_lib.MANIFEST)


@target("store", "prepare")
def plan_list(place):
  """The plan is a list."""
  (place.case / "plan.json").write_text("[1]")


@target("store", "prepare")
def plan_nested(place):
  """The plan is nested 100,000 deep."""
  nested(place.case / "plan.json")


@target("store", "prepare")
def plan_fifo(place):
  """The plan is a pipe."""
  fifo(place.case / "plan.json")


@target("store", "train")
def store_tokenizer_swapped(place):
  """The tokenizer is that of another store, of the same size."""
  replace(place.case / "tokenizer.model", place.root / "other_store/tokenizer.model")


@target("store", "verify")
def store_tokens_zeroed(place):
  """Training tokens are zero, with valid checksums of their chunks."""
  array(place, "train/tokens", lambda x: np.where(np.arange(len(x)) < 500, 0, x).astype(x.dtype))


@target("store", "verify")
def store_offsets_changed(place):
  """Documents begin one token later, with valid checksums of their chunks."""
  array(place, "train/offsets", lambda x: np.concatenate([x[:1], x[1:-1] + 1, x[-1:]]))


@target("store", "verify")
def store_heldout_tokens_changed(place):
  """Held-out tokens are in another order, with valid checksums of their chunks."""
  array(place, "heldout/tokens", lambda x: x[::-1])


@target("store", "prepare")
@target("parts", "prepare")
@target("autoencoder", "resume")
def garbage_lease(place):
  """A lease holds garbage."""
  (place.case / ".lease").write_bytes(b"\xff{nothing")


# Parts of a store.


def _part(place: specimens.Place, ending: str) -> pathlib.Path:
  """Returns the path of a file of the first part."""
  (path,) = place.case.glob(f"unfinished/*/00000.{ending}")
  return path


@target("parts", "prepare")
def part_counts_empty_object(place):
  """The counts of a part are {}."""
  _part(place, "json").write_text("{}")


@target("parts", "prepare")
def part_counts_list(place):
  """The counts of a part are a list."""
  _part(place, "json").write_text("[1, 2]")


@target("parts", "prepare")
def part_counts_text(place):
  """A count of a part is text."""
  edit(_part(place, "json"), **{"counts__train.tokens": "many"})


@target("parts", "prepare")
def part_counts_changed(place):
  """The counts of a part have two tokens fewer than the part."""
  edit(_part(place, "json"), **{"counts__train.tokens": lambda count: count - 2})


@target("parts", "prepare")
def part_counts_nested(place):
  """The counts of a part are nested 100,000 deep."""
  nested(_part(place, "json"))


@target("parts", "prepare")
def part_tokens_zeroed(place):
  """The tokens of a part are zeros."""
  path = _part(place, "train.tokens")
  path.write_bytes(bytes(path.stat().st_size))


@target("parts", "prepare")
def part_tokens_cut(place):
  """The last tokens of a part are missing."""
  path = _part(place, "train.tokens")
  path.write_bytes(path.read_bytes()[:-40])


@target("parts", "prepare")
def part_tokens_odd(place):
  """The last byte of a part's tokens is missing."""
  path = _part(place, "train.tokens")
  path.write_bytes(path.read_bytes()[:-1])


@target("parts", "prepare")
def part_lengths_zeroed(place):
  """The lengths of a part's documents are zeros."""
  path = _part(place, "train.lengths")
  path.write_bytes(bytes(path.stat().st_size))


@target("parts", "prepare")
def part_file_gone(place):
  """The held-out tokens of a part are missing."""
  _part(place, "heldout.tokens").unlink()


@target("parts", "prepare")
def part_tokenizer_swapped(place):
  """The tokenizer of the parts was replaced by another."""
  (path,) = place.case.glob("unfinished/*/tokenizer.model")
  replace(path, place.root / "other_store/tokenizer.model")


@target("parts", "prepare")
def part_tokenizer_empty(place):
  """The tokenizer of the parts is empty."""
  (path,) = place.case.glob("unfinished/*/tokenizer.model")
  path.write_bytes(b"")
