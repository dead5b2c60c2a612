"""Settings -> a stage without a workdir, for planning and benchmarks."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from calm_jax import workdir
from calm_jax.stages import table
from calm_jax.training import stage as stage_lib
from calm_jax.training import trained as trained_lib

Params = Any
# (key -> initial parameters) -> parameters, such as `abstract`.
Make = Callable[[Callable[[jax.Array], Params]], Params]


def parent_runs(run: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the settings of a run's parents and of theirs, by name; the nearer one wins.

  They are those of `overrides`, else their stage's default.
  """
  result, own = {}, {}
  for name, stage in table.of(run).parents.items():
    own[name] = overrides.get(name) or table.STAGES[stage].run()
    result |= parent_runs(own[name], overrides)
  return result | own


def abstract(initial: Callable[[jax.Array], Params]) -> Params:
  """Returns the shapes of initial parameters, without creating arrays."""
  return jax.eval_shape(lambda: initial(jax.random.key(0)))


def trained(
  run: Any, runs: Mapping[str, Any], vocab_size: int, make: Make, dtype: str = ""
) -> trained_lib.Trained:
  """Returns a stage as if it were trained, with parameters from `make`.

  Args:
    runs: settings of its parents, and of theirs, by name; see `parent_runs`.
    dtype: compute type of the model; by default that of training.
  """
  dtype = dtype or run.training.compute_dtype
  spec, parents = table.of(run), _parents(run, runs, vocab_size, make, dtype)
  model = spec.model(run, parents, vocab_size, dtype)
  origin = workdir.Origin("", "", "", vocab_size, eos_id=0, appends_eos=True, start_patch=())
  return trained_lib.Trained(run, origin, make(model.initial), 0, model, "", parents)


def functions(run: Any, runs: Mapping[str, Any], vocab_size: int, make: Make) -> stage_lib.Stage:
  """Returns a stage's functions for the loop, with parents as `trained` makes them."""
  spec, dtype = table.of(run), run.training.compute_dtype
  parents = _parents(run, runs, vocab_size, make, dtype)
  return spec.stage(run, spec.model(run, parents, vocab_size, dtype), parents)


def _parents(
  run: Any, runs: Mapping[str, Any], vocab_size: int, make: Make, dtype: str
) -> dict[str, trained_lib.Trained]:
  own = parent_runs(run, runs)
  return {name: trained(own[name], runs, vocab_size, make, dtype) for name in table.of(run).parents}
