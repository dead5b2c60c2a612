"""Documents -> splits: what is held out, decided before anything is tokenized.

Documents are held out whole, by a hash of their text, so that copies of one share a split.
Where that is a lottery, with fewer than 100 documents, or where it leaves a split empty, the
end of the corpus is held out instead, one document cut in two if need be. It is one stretch,
and not the end of each document: of short documents those would be fragments of a few tokens,
in which a model sees no context. Either way a document's split follows from the input and the
share alone, so that neither the number of workers nor a kill shows.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from calm_jax import errors

DOCUMENTS, END, NOTHING = "documents", "end", "nothing"  # Manifest.heldout_by.
FEW_DOCUMENTS = 100

# A document is cut where a line or a word ends, if one does in so many letters before.
_WORD_LETTERS = 1000


@dataclasses.dataclass(frozen=True)
class Cut:
  """Where the end of a corpus begins: part, document of that part, letter of that document."""

  part: int
  document: int
  letter: int


@dataclasses.dataclass(frozen=True)
class Division:
  """Which document goes to which split.

  Attributes:
    share: of documents, or of letters, that are held out.
    cut: where the end is held out; None where documents are, by their hash.
    documents: how many there are, where the end is held out.
  """

  share: float
  cut: Cut | None = None
  documents: int = 0

  @property
  def by(self) -> str:
    """How it is held out: `DOCUMENTS`, `END` or `NOTHING`."""
    if not self.share:
      return NOTHING
    return END if self.cut else DOCUMENTS

  def of(self, part: int, document: int, text: str) -> list[tuple[str, str]]:
    """Returns (split, text) for a document, twice for the one that is cut in two.

    Args:
      document: counts from 0 in each part.
    """
    if self.cut is None:
      return [("heldout" if is_heldout(text, self.share) else "train", text)]
    place, cut = (part, document), (self.cut.part, self.cut.document)
    if place != cut:
      return [("train" if place < cut else "heldout", text)]
    letter = self.cut.letter
    pieces = [("train", text[:letter]), ("heldout", text[letter:])]
    return [(split, piece) for split, piece in pieces if piece]


def is_heldout(text: str, share: float) -> bool:
  """Tells whether a document is held out, by its content, so that its copies are too."""
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "big") < share * 2**64


def decide(parts: Sequence[Callable[[], Iterable[str]]], share: float) -> Division:
  """Returns how a corpus is divided.

  Reads until it has seen `FEW_DOCUMENTS` and both splits, so that of a big corpus only the
  beginning is read.

  Args:
    parts: each returns the documents of a part of the corpus, in order.
    share: of what is held out; 0 for nothing.

  Raises:
    CalmError: if there is no text, or so little that the share leaves a split empty.
  """
  documents, letters, splits = 0, 0, set()
  for text in (text for part in parts for text in part()):
    documents, letters = documents + 1, letters + len(text)
    splits.add(is_heldout(text, share))
    if not share or (documents >= FEW_DOCUMENTS and len(splits) == 2):
      return Division(share)
  if not documents:
    raise errors.CalmError("there is no text in what --input gives")
  heldout = round(share * letters)
  if not 0 < heldout < letters:
    empty = "train" if heldout else "heldout"
    raise errors.CalmError(
      f"--heldout={share} of {letters:,} letters leaves nothing for the {empty} split: give more "
      "text or another share"
    )
  near = min(_WORD_LETTERS, heldout // 10)
  return Division(share, _cut(parts, letters - heldout, near), documents)


def _cut(parts: Sequence[Callable[[], Iterable[str]]], letters: int, near: int) -> Cut:
  """Returns where the first `letters` end, or a line or a word at most `near` letters before."""
  begun = 0
  for part, document, text in _numbered(parts):
    if begun + len(text) > letters:
      exact = letters - begun
      ends = (text.rfind(space, max(0, exact - near), exact) + 1 for space in "\n ")
      return Cut(part, document, next((end for end in ends if end), exact))
    begun += len(text)
  raise errors.CalmError("the input changed while it was read: run prepare again")


def _numbered(parts: Sequence[Callable[[], Iterable[str]]]) -> Iterator[tuple[int, int, str]]:
  for number, part in enumerate(parts):
    for document, text in enumerate(part()):
      yield number, document, text
