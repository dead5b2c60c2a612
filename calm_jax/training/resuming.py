"""The checkpoint that a run resumes from: it must exist, and finite steps must follow it."""

from etils import epath

from calm_jax import errors, workdir
from calm_jax.training import checkpoint, ledger, metrics


class NonFinite(errors.CalmError):
  """A run can't continue; raised on all processes. `good` is its last finite step."""

  def __init__(self, message: str, good: int):
    super().__init__(message)
    self.good = good


def require_checkpoints(directory: str) -> None:
  """Raises CalmError if a workdir has saved checkpoints before and has none now."""
  folder = epath.Path(directory) / checkpoint.DIRECTORY
  if checkpoint.steps_in(directory):
    return
  attempts = ledger.attempts(epath.Path(directory))
  steps = (max(attempt["first_step"], attempt.get("saved", 0)) for attempt in attempts)
  saved = max(steps, default=0)
  if not attempts:
    saved = metrics.last_step(epath.Path(directory) / workdir.METRICS)
  if saved:
    raise errors.CalmError(
      f"{directory} was trained to step {saved} or further, but its checkpoints are gone: put "
      f"{folder} back, or give a new --workdir to start again"
    )


def step_back(checkpoints: checkpoint.Checkpoints, error: NonFinite, rate: float) -> str:
  """Returns advice after `error`; sets the newest checkpoint aside if no finite step follows it.

  All processes must call it. A checkpoint that is the only one stays.

  Args:
    rate: the learning rate of the run.
  """
  checkpoints.wait()
  steps = checkpoints.steps()
  advice = f"with a --config.optimizer.learning_rate below {rate:g} and --allow_config_change"
  if not steps:
    return f"there is no checkpoint: run the same command again {advice}"
  if steps[-1] < error.good:
    return f"the last good checkpoint is step {steps[-1]}: resume from it {advice}"
  if len(steps) == 1:
    return (
      f"the only checkpoint, step {steps[0]}, may be damaged, as no finite step followed it: try "
      f"to resume from it {advice}, or give a new --workdir"
    )
  checkpoints.set_aside_after(steps[-2])
  return (
    f"the checkpoint of step {steps[-1]}, which no finite step followed, is set aside; the last "
    f"good one is step {steps[-2]}: resume from it {advice}"
  )
