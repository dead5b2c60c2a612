"""Signals, watchdog and time accounting for one run, from its first second."""

from calm_jax import config
from calm_jax.training import ledger, stopping, watchdog


class Guard:
  """A context for one attempt at a run.

  Attributes:
    stop: the stop signal that was received, if any.
    watchdog: enforces the time limits of each phase.
    ledger: records how the seconds were spent.
  """

  def __init__(self, limits: config.Limits):
    self.stop = stopping.Stop()
    self.ledger = ledger.Ledger()
    self._limits = limits

  def __enter__(self) -> "Guard":
    self.stop.__enter__()
    self.watchdog = watchdog.Watchdog(self._limits)
    return self

  def __exit__(self, *error) -> None:
    self.watchdog.end()
    self.stop.__exit__(*error)
