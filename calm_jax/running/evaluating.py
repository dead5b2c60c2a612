"""A trained stage -> the functions that score it."""

from typing import Any

from calm_jax import resolve
from calm_jax.stages import table
from calm_jax.training import stage
from calm_jax.training import trained as trained_lib


def functions(trained: trained_lib.Trained, samples: int = 0) -> tuple[stage.Stage, dict[str, Any]]:
  """Returns a trained stage's functions, and the settings that its figures depend on.

  Args:
    samples: N, samples per patch in evaluation; 0 for as many as in training. Ignored for a stage
      that draws no samples.
  """
  run, spec = trained.run, table.of(trained.run)
  conditions = {}
  if spec.samples:
    run = resolve.changed(run, spec.samples, samples or resolve.at(run, spec.samples))
    conditions = {"samples": resolve.at(run, spec.samples)}
  return spec.stage(run, trained.model, trained.parents), conditions
