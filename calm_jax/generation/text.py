"""Tokens -> text, incrementally; text -> text that a terminal or a page can safely show."""

import re
from collections.abc import Callable, Sequence
from typing import TextIO

# Characters that act on the program that shows them: control characters except newline and
# tab, marks of text direction, and halves of surrogate pairs, which have no UTF-8.
_ACTIVE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
  """Returns a text with active characters escaped, such as ESC as \\x1b."""
  return _ACTIVE.sub(lambda match: ascii(match[0])[1:-1], text)


def for_stream(stream: TextIO, text: str, raw: bool = False) -> str:
  """Returns a text as it is written to a stream: `visible` for a terminal, unless `raw`."""
  return visible(text) if stream.isatty() and not raw else text


class Stream:
  """The text of a growing sequence of tokens, in pieces that are never taken back.

  A character that is split between tokens is held back until its last byte, and what may
  become a stop string until that is decided.

  Attributes:
    stopped: whether a stop string has appeared; the text ends before it.
  """

  def __init__(
    self, decode: Callable[[list[int]], str], prompt: Sequence[int], stop: Sequence[str] = ()
  ):
    """Starts with an empty text.

    Args:
      decode: a tokenizer's decode.
      prompt: the tokens before the text.
      stop: strings before which the text ends.
    """
    self._decode, self._tokens, self._stop = decode, list(prompt), tuple(stop)
    self._begin = self._shown = len(self._stable())
    self.stopped = False

  def _stable(self) -> str:
    return self._decode(self._tokens).rstrip("\N{REPLACEMENT CHARACTER}")

  def _ends(self, text: str) -> list[int]:
    """Returns where stop strings begin in the text after the prompt."""
    positions = (text.find(stop, self._begin) for stop in self._stop)
    return [position for position in positions if position >= 0]

  def push(self, tokens: Sequence[int]) -> str:
    """Adds tokens; returns the text that they make final."""
    if self.stopped:
      return ""
    self._tokens.extend(tokens)
    text = self._stable()
    ends = self._ends(text)
    if ends:
      self.stopped, final_length = True, min(ends)
    else:
      held_back = (
        size
        for stop in self._stop
        for size in range(len(stop) - 1, 0, -1)
        if text.endswith(stop[:size], self._begin)
      )
      final_length = len(text) - max(held_back, default=0)
    return self._show(text, final_length)

  def _show(self, text: str, final_length: int) -> str:
    piece = text[self._shown : final_length]
    self._shown = max(self._shown, final_length)
    return piece

  def close(self) -> str:
    """Returns the text that was held back, when no more tokens follow."""
    if self.stopped:
      return ""
    text = self._decode(self._tokens)
    return self._show(text, len(text))
