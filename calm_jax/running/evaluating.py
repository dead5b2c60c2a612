"""Trained weights of any stage -> what their scores are computed with."""

from typing import Any

from calm_jax import resolve
from calm_jax.stages import table
from calm_jax.training import stage
from calm_jax.training import trained as trained_lib


def functions(trained: trained_lib.Trained, samples: int = 0) -> tuple[stage.Stage, dict[str, Any]]:
  """Returns a trained stage's functions, and what else its figures depend on.

  Args:
    samples: N, samples a patch in evaluation, of a stage that has them; 0 for as many as in
      training.
  """
  run, spec = trained.run, table.of(trained.run)
  conditions = {}
  if spec.samples:
    run = resolve.changed(run, spec.samples, samples or resolve.at(run, spec.samples))
    conditions = {"samples": resolve.at(run, spec.samples)}
  return spec.stage(run, trained.model, trained.parents), conditions
