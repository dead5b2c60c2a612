"""A workdir -> the account of its run, for reports."""

from calm_jax.reporting import records
from calm_jax.running import loading
from calm_jax.stages import table


def read(directory: str) -> records.Account:
  """Returns the account of a workdir's run.

  Raises:
    CalmError: see `records.read`.
  """
  run = loading.read_run(directory)
  spec = table.of(run)
  return records.read(directory, run, spec.presentation, generates=spec.writing is not None)
