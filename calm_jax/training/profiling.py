"""Steps -> a profile: a trace of a window of steps, or a server that a profiler connects to."""

import jax
from etils import epath

from calm_jax import config, distributed
from calm_jax.training import metrics

FOLDER = "profile"


class Window:
  """Traces `steps` steps after the first `skip` steps of an attempt; see `config.Profile`.

  Every process writes its own trace; process 0 also writes a memory profile after the
  last step of the window.
  """

  def __init__(self, settings: config.Profile, directory: epath.Path):
    self._settings, self._folder = settings, directory / FOLDER
    self._taken = 0
    if settings.port:
      jax.profiler.start_server(settings.port)

  def before_step(self) -> None:
    """Starts the trace if this is the window's first step."""
    if self._settings.steps and self._taken == self._settings.skip:
      jax.profiler.start_trace(str(self._folder))

  def after_step(self, figures: dict[str, jax.Array]) -> None:
    """Stops the trace if this was the window's last step, once `figures` are computed."""
    self._taken += 1
    if self._settings.steps and self._taken == self._settings.skip + self._settings.steps:
      jax.block_until_ready(figures)
      jax.profiler.stop_trace()
      if distributed.is_first():
        jax.profiler.save_device_memory_profile(str(self._folder / "memory.prof"))
      metrics.show(f"wrote the profile of {self._settings.steps} steps to {self._folder}")

  def close(self) -> None:
    """Stops a trace that is still running, because the run ended inside the window."""
    if self._settings.skip < self._taken < self._settings.skip + self._settings.steps:
      jax.profiler.stop_trace()
