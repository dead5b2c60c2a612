"""Signals -> a stop that loses no step: preemption sends SIGTERM, Ctrl-C sends SIGINT."""

import signal
import socket
import threading
from typing import Any

from calm_jax import distributed, errors

CODES = {signal.SIGTERM: errors.EXIT_RESTART, signal.SIGINT: errors.EXIT_INTERRUPTED}


class Stop:
  """Stores the first SIGINT or SIGTERM for the loop to read; the second acts as usual.

  While nothing is unsaved, the process exits at once instead, whatever it is doing: a
  thread receives the signal even while the main thread is in the compiler.

  A SIGINT that was ignored when the process started stays ignored: a shell ignores it for
  background jobs, as Ctrl-C is meant for the foreground. SIGTERM is always handled.

  Attributes:
    signal: the signal that was received; None before.
    unsaved: whether the process holds anything that a stop must save first.
  """

  def __init__(self):
    self.signal: signal.Signals | None = None
    self.unsaved = True
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "Stop":
    self._receiver, self._sender = socket.socketpair()
    self._sender.setblocking(False)
    descriptor = self._sender.fileno()
    self._previous_fd = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
    for number in CODES:
      if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
        self._previous[number] = signal.signal(number, self._store)
    self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
    self._thread.start()
    return self

  @property
  def code(self) -> int:
    """Exit code after the stop: that of a restart if only another process got a signal."""
    return CODES[self.signal] if self.signal else errors.EXIT_RESTART

  def _store(self, number: int, _) -> None:
    self.signal = signal.Signals(number)
    self._restore_handlers()

  def _watch(self) -> None:
    while number := self._receiver.recv(1):
      if not self.unsaved and number[0] in CODES:
        received = signal.Signals(number[0])
        distributed.say(f"{received.name}: nothing is unsaved; the same command resumes from here")
        distributed.exit_now(CODES[received])

  def _restore_handlers(self) -> None:
    while self._previous:
      signal.signal(*self._previous.popitem())

  def __exit__(self, *_) -> None:
    self._restore_handlers()
    signal.set_wakeup_fd(self._previous_fd)
    self._sender.close()  # Ends the thread.
    self._thread.join()
    self._receiver.close()
