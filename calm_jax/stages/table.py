"""The table of stages: name -> description."""

from collections.abc import Mapping
from typing import Any

from calm_jax import config, resolve
from calm_jax.stages import autoencoder, calm, spec, tempered, transformer

STAGES: dict[str, spec.Spec] = {
  "autoencoder": autoencoder.SPEC,
  "calm": calm.SPEC,
  "transformer": transformer.SPEC,
  "tempered": tempered.SPEC,
}


def of(run: config.Run) -> spec.Spec:
  """Returns the description of a run's stage."""
  return STAGES[run.stage]


def run_from(values: Mapping[str, Any]) -> Any:
  """Returns the settings that a config file or a stored config.json describes.

  Raises:
    CalmError: see `resolve.run_from`.
  """
  return resolve.run_from(values, {name: row.run for name, row in STAGES.items()})
