"""A window of steps for a profiler, and a server for one that asks."""

import jax
from etils import epath

from calm_jax import config, distributed
from calm_jax.training import metrics

FOLDER = "profile"


class Window:
  """Traces `steps` steps after the first `skip` of an attempt; see `config.Profile`.

  Every process writes its own trace; process 0's memory is looked at after the last step.
  """

  def __init__(self, settings: config.Profile, directory: epath.Path):
    self._settings, self._folder = settings, directory / FOLDER
    self._taken = 0
    if settings.port:
      jax.profiler.start_server(settings.port)

  def before_step(self) -> None:
    """Opens the window if this is its first step."""
    if self._settings.steps and self._taken == self._settings.skip:
      jax.profiler.start_trace(str(self._folder))

  def after_step(self, figures: dict[str, jax.Array]) -> None:
    """Closes the window if this was its last step: `figures` are what it waits for."""
    self._taken += 1
    if self._settings.steps and self._taken == self._settings.skip + self._settings.steps:
      jax.block_until_ready(figures)
      jax.profiler.stop_trace()
      if distributed.is_first():
        jax.profiler.save_device_memory_profile(str(self._folder / "memory.prof"))
      metrics.show(f"wrote the profile of {self._settings.steps} steps to {self._folder}")

  def close(self) -> None:
    """Ends a trace that is still open, as where a run stops inside the window."""
    if self._settings.skip < self._taken < self._settings.skip + self._settings.steps:
      jax.profiler.stop_trace()
