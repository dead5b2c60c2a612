"""A workdir of any stage -> its settings and its trained weights."""

from typing import Any

from etils import epath

from calm_jax import errors, workdir
from calm_jax.stages import table
from calm_jax.training import trained as trained_lib


def read_run(directory: str) -> Any:
  """Returns the settings of a workdir.

  Raises:
    CalmError: if there is none, or it can't be read.
  """
  return table.run_from(workdir.read_config(directory))


def load(directory: str, stage: str = "", dtype: str = "") -> trained_lib.Trained:
  """Returns the newest readable weights of a workdir, ready to use, and those of its parents.

  Args:
    stage: stage that the workdir must hold; "" for any.
    dtype: compute type of the model; by default that of training.

  Raises:
    CalmError: if there are none, they are not of `stage`, or a part of the workdir is not the
      one that the run wrote.
  """
  workdir.require_intact(directory)
  run, origin = read_run(directory), workdir.read_origin(directory)
  spec = table.of(run)
  if stage and run.stage != stage:
    raise errors.CalmError(f"{directory} holds {spec.title}, not {table.STAGES[stage].title}")
  dtype = dtype or run.training.compute_dtype
  parents = {}
  for name, parent_stage in spec.parents.items():
    parents[name] = load(str(epath.Path(directory) / name), parent_stage, dtype)
    workdir.require_parent_weights(directory, origin, name, parents[name].fingerprint)
  model = spec.model(run, parents, origin.vocab_size, dtype)
  restored = trained_lib.restore(directory, model)
  fingerprint = restored.meta["params_fingerprint"]
  return trained_lib.Trained(
    run, origin, restored.params, restored.step, model, fingerprint, parents
  )
