"""Documents -> splits: which documents are held out, decided before tokenization.

Complete documents are held out by a hash of their text, so all copies of a document share a
split. With fewer than 100 documents, where that share would vary widely, or where a split would be
empty, the end of the corpus is held out instead, and one document may be cut in two. The end is one
stretch of the corpus rather than the end of each document: the ends of short documents would be
fragments of a few tokens without context. Either way a document's split depends only on the
input and the share, not on the number of workers or on a restart.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from calm_jax import errors

DOCUMENTS, END, NOTHING = "documents", "end", "nothing"  # Manifest.heldout_by.
FEW_DOCUMENTS = 100

# A document is cut at the end of a line or word within this many characters before the exact cut.
_MOST_BACK = 1000


@dataclasses.dataclass(frozen=True)
class Cut:
  """Where the held-out end of a corpus begins.

  Attributes:
    part: index of the part.
    document: index of the document in the part.
    character: index of the character in the document.
  """

  part: int
  document: int
  character: int


@dataclasses.dataclass(frozen=True)
class Division:
  """Assigns documents to splits.

  Attributes:
    share: held-out share, in [0, 1), of documents or of characters.
    cut: where the held-out end begins; None if documents are held out by their hash.
    documents: number of documents if the end is held out, else 0.
  """

  share: float
  cut: Cut | None = None
  documents: int = 0

  @property
  def heldout_by(self) -> str:
    """What is held out: `DOCUMENTS`, `END` or `NOTHING`."""
    if not self.share:
      return NOTHING
    return END if self.cut else DOCUMENTS

  def split(self, part: int, document: int, text: str) -> list[tuple[str, str]]:
    """Returns (split, text) of a document, two such pairs if it is cut in two.

    Args:
      part: index of the part.
      document: index of the document in its part, from 0.
      text: the document.
    """
    if self.cut is None:
      return [("heldout" if is_heldout(text, self.share) else "train", text)]
    position, cut = (part, document), (self.cut.part, self.cut.document)
    if position != cut:
      return [("train" if position < cut else "heldout", text)]
    pieces = [("train", text[: self.cut.character]), ("heldout", text[self.cut.character :])]
    return [(split, piece) for split, piece in pieces if piece]


def is_heldout(text: str, share: float) -> bool:
  """Returns whether a document is held out, decided by a hash of its text."""
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "big") < share * 2**64


def decide(parts: Sequence[Callable[[], Iterable[str]]], share: float) -> Division:
  """Returns the division of a corpus into splits.

  Reads until it has seen `FEW_DOCUMENTS` documents and both splits, which is the beginning
  of a large corpus.

  Args:
    parts: functions that return the documents of one part of the corpus each, in order.
    share: held-out share, in [0, 1); 0 holds nothing out.

  Raises:
    CalmError: if there is no text, or so little that the share leaves a split empty.
  """
  documents, characters, splits = 0, 0, set()
  for text in (text for part in parts for text in part()):
    documents, characters = documents + 1, characters + len(text)
    splits.add(is_heldout(text, share))
    if not share or (documents >= FEW_DOCUMENTS and len(splits) == 2):
      return Division(share)
  if not documents:
    raise errors.CalmError("there is no text in --input")
  heldout = round(share * characters)
  if not 0 < heldout < characters:
    empty = "train" if heldout else "heldout"
    raise errors.CalmError(
      f"--heldout={share} of {characters:,} characters leaves nothing for the {empty} split: give "
      "more text or another share"
    )
  most_back = min(_MOST_BACK, heldout // 10)
  return Division(share, _cut(parts, characters - heldout, most_back), documents)


def _cut(parts: Sequence[Callable[[], Iterable[str]]], characters: int, most_back: int) -> Cut:
  """Returns the place after the first `characters` of a corpus.

  A line or word that ends at most `most_back` characters before moves the cut to its end.
  """
  before = 0
  for part, document, text in _numbered(parts):
    if before + len(text) > characters:
      exact = characters - before
      ends = (text.rfind(space, max(0, exact - most_back), exact) + 1 for space in "\n ")
      return Cut(part, document, next((end for end in ends if end), exact))
    before += len(text)
  raise errors.CalmError("the input changed while it was read: run prepare again")


def _numbered(parts: Sequence[Callable[[], Iterable[str]]]) -> Iterator[tuple[int, int, str]]:
  """Yields (part, document, text) of all documents."""
  for number, part in enumerate(parts):
    for document, text in enumerate(part()):
      yield number, document, text
