"""Time limits for the phases of a run: a process that exceeds one exits, to be restarted."""

import faulthandler
import threading
import time

from calm_jax import config, distributed, errors


class Watchdog:
  """Exits the process when a phase exceeds its limit, after printing the stacks of all threads.

  The exit code is errors.EXIT_RESTART. A limit of 0 means no limit.
  """

  def __init__(self, limits: config.Limits):
    self._minutes = {
      "startup": limits.startup_minutes,
      "step": limits.step_minutes,
      "shutdown": limits.shutdown_minutes,
    }
    self._lock = threading.Lock()
    self._over = threading.Event()
    self.begin("startup")
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
    self._thread.start()

  def begin(self, phase: str) -> None:
    """Starts timing a phase: startup, step (of training or of evaluation) or shutdown."""
    with self._lock:
      self._phase, self._since = phase, time.monotonic()

  def end(self) -> None:
    """Stops watching."""
    self._over.set()
    self._thread.join()

  def _watch(self) -> None:
    while not self._over.wait(0.5):
      with self._lock:
        phase, seconds = self._phase, time.monotonic() - self._since
      minutes = self._minutes[phase]
      if minutes and seconds > 60 * minutes:
        distributed.say(
          f"{phase} has taken more than config.limits.{phase}_minutes={minutes:g}: stopping, to be "
          "started again; what each thread was doing:"
        )
        faulthandler.dump_traceback(2, all_threads=True)
        distributed.exit_now(errors.EXIT_RESTART)
