"""Requests -> texts, shown as they come, with what they took."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from calm_jax.data import tokenizer as tokenizer_lib
from calm_jax.generation import decode, requests, text


@dataclasses.dataclass
class Text:
  """A text and what it took.

  Attributes:
    tokens: new ones. draws: candidates made, a patch each. seen: those that the rule saw.
    unsettled: patches whose draws ended before the rule settled.
  """

  text: str = ""
  tokens: int = 0
  draws: list[int] = dataclasses.field(default_factory=list)
  seen: int = 0
  unsettled: int = 0

  def record(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


@dataclasses.dataclass
class Speed:
  """Time of texts, that of the first steps of each kind of batch, which compile, apart."""

  first_seconds: float = 0.0
  seconds: float = 0.0
  tokens: int = 0
  patches: int = 0
  draws: int = 0
  unsettled: int = 0

  def line(self) -> str:
    parts = [f"{self.first_seconds:.1f} s to the first tokens"]
    if self.seconds:
      parts.append(f"then {self.tokens / self.seconds:,.1f} tokens/s")
    if self.draws > self.patches:
      share = self.unsettled / self.patches
      parts.append(f"{self.draws / self.patches:.1f} candidates a patch")
      parts.append(f"{share:.0%} of patches chosen where the draws ended")
    return ", ".join(parts)


class Session:
  """Writes batches of texts with one decoder and adds up their time."""

  def __init__(self, decoder: decode.Decoder, tokenizer: tokenizer_lib.Tokenizer):
    self.speed = Speed()
    self._decoder, self._tokenizer = decoder, tokenizer

  def write(
    self,
    wishes: Sequence[requests.Request],
    every: int,
    show: Callable[[int, str], None] = lambda row, piece: None,
  ) -> list[Text]:
    """Returns the texts of a batch.

    Args:
      every: patches between two looks at what was written, the only moments at which
        a text is shown or ends at a stop string.
      show: called with a text's number in the batch and a new piece of it.

    Raises:
      CalmError: see `decode.Decoder.start` and `decode.Writing.advance`.
    """
    start = time.perf_counter()
    writing, first = self._decoder.start(wishes), True
    streams = [text.Stream(self._tokenizer.decode, wish.prompt, wish.stop) for wish in wishes]
    texts = [Text() for _ in wishes]
    while not writing.done:
      fresh = 0
      for row, written in enumerate(writing.advance(every)):
        stream, found = streams[row], texts[row]
        if not written.drawn:  # It has ended before.
          continue
        piece = stream.push(written.tokens)
        if stream.stopped:
          writing.end(row)
        elif written.ended:
          piece += stream.close()
        found.text += piece
        found.tokens += len(written.tokens)
        found.draws += written.drawn
        found.seen += sum(written.seen)
        unsettled = len(written.settled) - sum(written.settled)
        found.unsettled += unsettled
        self.speed.unsettled += unsettled
        fresh += len(written.tokens)
        self.speed.patches += len(written.drawn)
        self.speed.draws += sum(written.drawn)
        show(row, piece)
      seconds, start = time.perf_counter() - start, time.perf_counter()
      if first:
        self.speed.first_seconds += seconds
      else:
        self.speed.seconds += seconds
        self.speed.tokens += fresh
      first = False
    return texts
