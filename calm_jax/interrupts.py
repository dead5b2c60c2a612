"""Ctrl-C in acts that have nothing to save: one word, whatever the process is in the middle of.

KeyboardInterrupt raised while JAX is imported or compiles ends in a traceback, is
swallowed, or crashes what it is raised in.
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
  """Has Ctrl-C end the process with code 130, unless it does nothing here or something else."""
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _quit)


@contextlib.contextmanager
def first(action: Callable[[], None]) -> Iterator[None]:
  """Has Ctrl-C do `action` before it ends the process, where `end_at_once` was called."""
  in_main = threading.current_thread() is threading.main_thread()
  if not in_main or signal.getsignal(signal.SIGINT) is not _quit:
    yield
    return

  def act_and_quit(*_) -> NoReturn:
    signal.signal(signal.SIGINT, _quit)  # The second does not wait.
    action()
    _quit()

  signal.signal(signal.SIGINT, act_and_quit)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, _quit)
