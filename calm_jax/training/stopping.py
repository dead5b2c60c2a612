"""Signals -> a stop that loses nothing: SIGTERM is what preemption sends, SIGINT is Ctrl-C."""

import signal
import socket
import threading
from typing import Any

from calm_jax import distributed, errors

CODES = {signal.SIGTERM: errors.EXIT_RESTART, signal.SIGINT: errors.EXIT_INTERRUPTED}


class Stop:
  """Turns the first SIGINT or SIGTERM into a note that the loop reads; the second acts as usual.

  While nothing is unsaved the process ends at once instead, whatever it is in the
  middle of: a thread hears of the signal even while the compiler has the main one.

  A SIGINT that was ignored when the process began stays ignored, as the shell means it that
  starts a job in the background: Ctrl-C is for what runs in front. SIGTERM is always heeded.
  """

  def __init__(self):
    self.signal: signal.Signals | None = None
    self.unsaved = True
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "Stop":
    self._hear, told = socket.socketpair()
    told.setblocking(False)
    self._told = told
    self._previous_fd = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    for number in CODES:
      if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
        self._previous[number] = signal.signal(number, self._note)
    self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
    self._thread.start()
    return self

  @property
  def code(self) -> int:
    """What the process exits with after the stop; one that stops for another restarts."""
    return CODES[self.signal] if self.signal else errors.EXIT_RESTART

  def _note(self, number: int, _) -> None:
    self.signal = signal.Signals(number)
    self._restore_handlers()

  def _watch(self) -> None:
    while number := self._hear.recv(1):
      if not self.unsaved and number[0] in CODES:
        caught = signal.Signals(number[0])
        distributed.say(f"{caught.name}: nothing is unsaved; the same command goes on from here")
        distributed.exit_now(CODES[caught])

  def _restore_handlers(self) -> None:
    while self._previous:
      signal.signal(*self._previous.popitem())

  def __exit__(self, *_) -> None:
    self._restore_handlers()
    signal.set_wakeup_fd(self._previous_fd)
    self._told.close()  # Ends the thread.
    self._thread.join()
    self._hear.close()
