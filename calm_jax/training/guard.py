"""What stands around a run from its first second: signals, clocks and the book of its time."""

from calm_jax import config
from calm_jax.training import ledger, stopping, watchdog


class Guard:
  """A context for one attempt at a run.

  Attributes:
    stop: the signal that came, if one did. watchdog: limits of each phase. ledger: where
    the seconds went.
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
