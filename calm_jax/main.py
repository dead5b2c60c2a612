"""Trains a stage: `python -m calm_jax.main --config=configs/STAGE.py:SIZE --workdir=W`.

The same command resumes from the newest good checkpoint. One job at a time trains in a workdir;
a second one is refused.
"""

import os
import signal
import traceback

# A machine may be preempted while JAX is imported, before the guard handles signals.
if __name__ == "__main__":
  signal.signal(signal.SIGTERM, lambda *_: os._exit(75))  # errors.EXIT_RESTART

from absl import flags

from calm_jax import cli, distributed, errors, resolve, run_flags
from calm_jax.running import starting, train
from calm_jax.training import guard as guard_lib
from calm_jax.training import metrics

run_flags.define()
run_flags.define_processes()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of this run: checkpoints, metrics, the resolved config."
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
  "allow_config_change", False, "Resume in a workdir whose stored config differs."
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Check everything, compile the step and exit; nothing is written."
)
_PRINT_SHARDINGS = flags.DEFINE_bool(
  "print_shardings", False, "Print how every parameter is laid out on the devices."
)


def main() -> None:
  run = run_flags.run()
  if run is None or not _WORKDIR.value:
    raise errors.CalmError("give --config=configs/STAGE.py[:SIZE] and --workdir=DIR")
  options = train.Options(
    _ALLOW_CONFIG_CHANGE.value, _DRY_RUN.value, _PRINT_SHARDINGS.value, keep_compiled=True
  )
  with guard_lib.Guard(run.limits) as guard:
    guard.stop.unsaved = False
    distributed.initialize(run_flags.processes())
    distributed.say(distributed.describe(resolve.digest(run)))
    guard.ledger.part("join")
    try:
      train.train_run(run, _WORKDIR.value, options, guard)
      if not options.dry_run:
        small = run_flags.title().partition(" ")[0].endswith(":quickstart")
        size = "quickstart" if small else "m"
        metrics.show(starting.next_command(run, _WORKDIR.value, size))
    except (errors.CalmError, KeyboardInterrupt):
      raise
    except Exception:
      if distributed.count() == 1:
        raise
      traceback.print_exc()
      distributed.await_verdict()  # Another process's exit may show as any error here.
      distributed.exit_now(1)  # A normal exit would wait for the other processes.


if __name__ == "__main__":
  cli.run(main)
