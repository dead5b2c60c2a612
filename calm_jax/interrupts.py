"""Ctrl-C in acts that have nothing to save: print one word and exit, whatever is running.

A KeyboardInterrupt raised while JAX is imported or compiles ends in a traceback, is swallowed, or
crashes the code that it interrupts.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn


def _quit(*_) -> NoReturn:
  os.write(2, b"interrupted\n")
  os._exit(130)  # errors.EXIT_INTERRUPTED


def end_at_once() -> None:
  """Makes Ctrl-C end the process with code 130, unless it is ignored or handled already."""
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _quit)


@contextlib.contextmanager
def first(action: Callable[[], None]) -> Iterator[None]:
  """A context in which Ctrl-C runs `action` before it ends the process.

  It has no effect unless `end_at_once` was called.
  """
  in_main = threading.current_thread() is threading.main_thread()
  if not in_main or signal.getsignal(signal.SIGINT) is not _quit:
    yield
    return

  def act_and_quit(*_) -> NoReturn:
    signal.signal(signal.SIGINT, _quit)  # A second Ctrl-C does not wait for `action`.
    action()
    _quit()

  signal.signal(signal.SIGINT, act_and_quit)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, _quit)
