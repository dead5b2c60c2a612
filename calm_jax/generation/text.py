"""Tokens -> text, as they come; text -> what a terminal or a page may show of it."""

import re
from collections.abc import Callable, Sequence
from typing import TextIO

# What acts on whoever shows it: control characters but newline and tab, those that turn the
# direction of writing, and halves of surrogate pairs, which have no UTF-8.
_ACTIVE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
  """Returns a text with characters that act rather than show written out: ESC as \\x1b."""
  return _ACTIVE.sub(lambda found: ascii(found[0])[1:-1], text)


def told_to(stream: TextIO, text: str, raw: bool = False) -> str:
  """Returns what a stream is given of a text: a terminal, unless `raw`, what is visible of it."""
  return visible(text) if stream.isatty() and not raw else text


class Stream:
  """The text of a growing row of tokens, in pieces that are never taken back.

  Characters split between tokens wait for their last byte, and what may become a
  stop string waits until it has or has not.
  """

  def __init__(
    self, decode: Callable[[list[int]], str], prompt: Sequence[int], stop: Sequence[str] = ()
  ):
    """Takes a tokenizer's decode, the tokens before the text, and where the text ends.

    Attributes:
      stopped: whether a stop string has come, before which the text ended.
    """
    self._decode, self._tokens, self._stop = decode, list(prompt), tuple(stop)
    self._begin = self._shown = len(self._stable())
    self.stopped = False

  def _stable(self) -> str:
    return self._decode(self._tokens).rstrip("\N{REPLACEMENT CHARACTER}")

  def _ends(self, text: str) -> list[int]:
    found = (text.find(stop, self._begin) for stop in self._stop)
    return [at for at in found if at >= 0]

  def push(self, tokens: Sequence[int]) -> str:
    """Returns the text that is certain now and was not before."""
    if self.stopped:
      return ""
    self._tokens.extend(tokens)
    text = self._stable()
    ends = self._ends(text)
    if ends:
      self.stopped, certain = True, min(ends)
    else:
      waiting = (
        size
        for stop in self._stop
        for size in range(len(stop) - 1, 0, -1)
        if text.endswith(stop[:size], self._begin)
      )
      certain = len(text) - max(waiting, default=0)
    return self._show(text, certain)

  def _show(self, text: str, certain: int) -> str:
    piece = text[self._shown : certain]
    self._shown = max(self._shown, certain)
    return piece

  def close(self) -> str:
    """Returns what was held back, once no token follows."""
    if self.stopped:
      return ""
    text = self._decode(self._tokens)
    return self._show(text, len(text))
