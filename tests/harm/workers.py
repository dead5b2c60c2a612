"""Distributes cases to forked processes, each with its own folder."""

import json
import os
import pathlib
import traceback
from collections.abc import Callable, Sequence
from typing import Any


def spread(
  run_case: Callable[[Any, pathlib.Path], list[dict]],
  cases: Sequence[Any],
  root: pathlib.Path,
  jobs: int,
) -> list[dict]:
  """Runs `run_case` on all cases in `jobs` processes and returns the results in order.

  Raises:
    RuntimeError: if a worker fails.
  """
  children = {}
  for job in range(jobs):
    folder = root / f"worker{job}"
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if not pid:
      _work(run_case, cases[job::jobs], folder)
    children[pid] = folder
  codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
  if any(codes):
    raise RuntimeError(f"workers ended with {codes}")
  done = [json.loads((folder / "done.json").read_text()) for folder in children.values()]
  return [each for i in range(len(cases)) for each in done[i % jobs][i // jobs]]


def _work(run_case, cases: Sequence[Any], folder: pathlib.Path) -> None:
  """Runs cases, writes their results to done.json and ends the process."""
  code = 1
  try:
    done = [run_case(case, folder) for case in cases]
    (folder / "done.json").write_text(json.dumps(done))
    code = 0
  except BaseException:
    traceback.print_exc()
  finally:
    os._exit(code)
