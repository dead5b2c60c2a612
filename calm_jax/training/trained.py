"""Checkpoints of a workdir -> trained weights, and weights -> a workdir."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from etils import epath

from calm_jax import config, distributed, errors, seal, workdir
from calm_jax.parallel import mesh, rules
from calm_jax.training import checkpoint

Params = Any


class Model(Protocol):
  """Methods that every stage's model has; a stage's own functions may use others."""

  def initial(self, key: jax.Array) -> Params:
    """Returns initial parameters, float32."""
    ...

  def mapped(self, function: Callable[[Any], Any]) -> Any:
    """Returns the model with `function` applied to each of its linen modules."""
    ...


@dataclasses.dataclass(frozen=True)
class Trained:
  """A trained stage, ready to use.

  Attributes:
    run: its settings.
    origin: the data that it was trained on.
    params: its parameters.
    step: optimizer step of the parameters.
    model: a `Model`; its functions take `params`.
    fingerprint: fingerprint of the parameters.
    parents: trained stages that it was trained on, by the names in the stage's description:
      stage two has its frozen `autoencoder`.
  """

  run: Any
  origin: workdir.Origin
  params: Params
  step: int
  model: Any
  fingerprint: str = ""
  parents: Mapping[str, "Trained"] = dataclasses.field(default_factory=dict)


def runs(parents: Mapping[str, Trained]) -> dict[str, Any]:
  """Returns the settings of parents and of their own parents, by name; the nearer one wins."""
  result: dict[str, Any] = {}
  for parent in parents.values():
    result |= runs(parent.parents)
  return result | {name: parent.run for name, parent in parents.items()}


def restore(directory: str, model: Model) -> checkpoint.Restored:
  """Returns the newest readable parameters of a workdir, on the mesh that is set.

  Raises:
    CalmError: if there are none.
  """
  params = jax.eval_shape(model.initial, jax.random.key(0))
  checkpoints = checkpoint.Checkpoints(directory, concurrent_gb=checkpoint.few_gb(params))
  bound = seal.read(directory).bound
  restored = checkpoints.restore(rules.abstract(params, mesh.current()), bound=bound)
  checkpoints.close()
  if restored is None:
    raise errors.CalmError(f"{directory} has no checkpoint yet: train it first")
  return restored


def has_checkpoint(directory: str) -> bool:
  """Returns whether a run has saved a checkpoint."""
  checkpoints = checkpoint.Checkpoints(directory)
  steps = checkpoints.steps()
  checkpoints.close()
  return bool(steps)


def write(
  target: str, run: config.Run, origin: workdir.Origin, params: Params, step: int, tokenizer: Any
) -> None:
  """Writes weights as a workdir that can be loaded, but not resumed.

  Args:
    tokenizer: path of the tokenizer's file, which is copied.

  Raises:
    CalmError: if the workdir can't be written.
  """
  checkpoint.require_writable_name(target)
  concurrent_gb, path = checkpoint.few_gb(params), epath.Path(tokenizer)
  new_seal = workdir.sealed(target, run, origin, path)
  checkpoints = checkpoint.Checkpoints(target, keep_latest=1, concurrent_gb=concurrent_gb)
  saved = checkpoints.save(step, params, None, {"seal": new_seal.bound})
  if not distributed.everywhere("weights saved", checkpoints.wait() and saved):
    checkpoints.close()
    raise errors.CalmError(f"can't write the weights to {target}")
  checkpoints.prove()
  checkpoints.close()
  distributed.on_first("weights", lambda: workdir.create(target, run, origin, path, new_seal))


def copy_parent(trained: Trained, name: str, source: str, target: str) -> None:
  """Writes a frozen parent as a workdir, replacing the remains of an interrupted start.

  Raises:
    CalmError: if the copy can't be written, or `target` is a workdir of its own.
  """

  def clear() -> None:
    path = epath.Path(target)
    is_trained_in = any((path / entry).exists() for entry in (workdir.METRICS, "ledger"))
    if is_trained_in or os.path.realpath(source) == os.path.realpath(target):
      raise errors.CalmError(
        f"{target}, where the copy of the {name} belongs, is a workdir of its own: give another "
        "--workdir"
      )
    if path.exists():
      path.rmtree()

  distributed.on_first("clear", clear)
  for inner, parent in trained.parents.items():  # A parent's own parents are bound by its seal.
    copy_parent(parent, inner, str(epath.Path(source) / inner), str(epath.Path(target) / inner))
  tokenizer = epath.Path(source) / trained.origin.tokenizer_file
  write(target, trained.run, trained.origin, trained.params, trained.step, tokenizer)
