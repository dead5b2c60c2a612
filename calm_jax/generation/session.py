"""Requests -> texts, streamed during generation, with numbers of draws and times."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from calm_jax.data import tokenizer as tokenizer_lib
from calm_jax.generation import decode, requests, text


@dataclasses.dataclass
class Text:
  """A text and the draws that it took.

  Attributes:
    tokens: number of new tokens.
    draws: for each patch, the candidates that were drawn.
    seen: number of candidates that the rule saw, of all patches.
    unsettled: number of patches whose draws ended before the rule settled.
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
  """Seconds and counts of texts; the first steps of each batch, which may compile, are separate."""

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
  """Generates batches of texts with one decoder and adds up their time."""

  def __init__(self, decoder: decode.Decoder, tokenizer: tokenizer_lib.Tokenizer):
    self.speed = Speed()
    self._decoder, self._tokenizer = decoder, tokenizer

  def write(
    self,
    batch: Sequence[requests.Request],
    every: int,
    show: Callable[[int, str], None] = lambda row, piece: None,
  ) -> list[Text]:
    """Returns the texts of a batch.

    Args:
      every: number of patches between two reads by the host. Only a read shows texts, and
        ends them at stop strings.
      show: called with a text's index in the batch and its new piece.

    Raises:
      CalmError: see `decode.Decoder.start` and `decode.TextBatch.advance`.
    """
    start = time.perf_counter()
    text_batch, is_first = self._decoder.start(batch), True
    decode_tokens = self._tokenizer.decode
    streams = [text.Stream(decode_tokens, request.prompt, request.stop) for request in batch]
    texts = [Text() for _ in batch]
    while not text_batch.done:
      num_tokens = 0
      for row, written in enumerate(text_batch.advance(every)):
        stream, result = streams[row], texts[row]
        if not written.drawn:  # It had ended before.
          continue
        piece = stream.push(written.tokens)
        if stream.stopped:
          text_batch.end(row)
        elif written.ended:
          piece += stream.close()
        result.text += piece
        result.tokens += len(written.tokens)
        result.draws += written.drawn
        result.seen += sum(written.seen)
        unsettled = len(written.settled) - sum(written.settled)
        result.unsettled += unsettled
        self.speed.unsettled += unsettled
        num_tokens += len(written.tokens)
        self.speed.patches += len(written.drawn)
        self.speed.draws += sum(written.drawn)
        show(row, piece)
      seconds, start = time.perf_counter() - start, time.perf_counter()
      if is_first:
        self.speed.first_seconds += seconds
      else:
        self.speed.seconds += seconds
        self.speed.tokens += num_tokens
      is_first = False
    return texts
