"""Progress of reading a corpus: a bar on a terminal, elsewhere a line every 10 s."""

import sys
import time
from collections.abc import Callable

import tqdm

_LINE_SECONDS = 10.0  # Between progress lines, without a terminal.


class Progress:
  """Counts the bytes of source text read so far.

  Args:
    total: number of bytes to read.
    say: prints a line.
  """

  def __init__(self, total: int, say: Callable[[str], None]):
    self._total, self._say = total, say
    self._num_bytes, self._began = 0, time.monotonic()
    self._line_time = self._began
    terminal = sys.stderr.isatty()
    self._bar = tqdm.tqdm(total=total, unit="B", unit_scale=True) if terminal else None

  def add(self, size: int) -> None:
    """Counts `size` more bytes."""
    self._num_bytes += size
    now = time.monotonic()
    if self._bar is not None:
      self._bar.update(size)
    elif now - self._line_time > _LINE_SECONDS:
      self._line_time = now
      rate = self._num_bytes / (now - self._began) / 1e6
      share = self._num_bytes / max(1, self._total)
      self._say(f"{share:.0%} of {self._total / 1e6:.1f} MB, {rate:.1f} MB/s")

  def close(self) -> None:
    """Ends the bar and prints the average speed."""
    seconds = time.monotonic() - self._began
    if self._bar is not None:
      self._bar.close()
    if not self._num_bytes:
      return
    self._say(
      f"read {self._num_bytes / 1e6:.1f} of {self._total / 1e6:.1f} MB in {seconds:.1f} s, "
      f"{self._num_bytes / 1e6 / max(seconds, 1e-3):.1f} MB/s"
    )
