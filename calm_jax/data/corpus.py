"""Parts of a corpus -> documents, to choose the held-out split and to train a tokenizer."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

from calm_jax.data import holdout, readers

_SAMPLE_BYTES = 2**26  # Most text that a tokenizer is trained on.


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The documents of all inputs, in parts.

  Attributes:
    parts: the spans of each part, in order.
    text_field: field of JSON lines, column of Parquet.
    skip_bad_lines: whether bad lines are left out; if not, they are errors.
  """

  parts: Sequence[tuple[readers.Span, ...]]
  text_field: str
  skip_bad_lines: bool

  def texts(self, part: int) -> Iterator[str]:
    """Yields the documents of a part, in order.

    Raises:
      CalmError: see `readers.good_documents`.
    """
    for span in self.parts[part]:
      for item in readers.good_documents(span, self.text_field, self.skip_bad_lines):
        if isinstance(item, str):
          yield item

  def divide(self, share: float) -> holdout.Division:
    """Returns the division of the corpus into splits; see `holdout.decide`."""
    texts = [functools.partial(self.texts, part) for part in range(len(self.parts))]
    return holdout.decide(texts, share)

  def sample(self, division: holdout.Division) -> Iterator[str]:
    """Yields training text from all parts of the corpus, about `_SAMPLE_BYTES` bytes at most."""
    sizes = [sum(span.num_bytes for span in part) for part in self.parts]
    share = min(1.0, _SAMPLE_BYTES / max(1, sum(sizes)))
    for part, size in enumerate(sizes):
      bytes_left = share * size
      for number, document in enumerate(self.texts(part)):
        for split, text in division.split(part, number, document):
          if split == "train":
            yield text[: int(bytes_left) + 1]
            bytes_left -= len(text.encode())
        if bytes_left <= 0:
          break
