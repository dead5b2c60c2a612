"""Tokens -> text, as they come."""

from collections.abc import Callable, Sequence


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
