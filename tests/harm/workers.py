"""Cases shared out among forked processes, each with a folder of its own."""

import json
import os
import pathlib
import traceback
from collections.abc import Callable, Sequence
from typing import Any


def spread(
  one: Callable[[Any, pathlib.Path], list[dict]],
  cases: Sequence[Any],
  root: pathlib.Path,
  jobs: int,
) -> list[dict]:
  """Returns what `one` returns for each case, in order; a worker takes every jobs-th of them.

  Raises:
    RuntimeError: if a worker fails.
  """
  children = {}
  for job in range(jobs):
    folder = root / f"worker{job}"
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if not pid:
      _work(one, cases[job::jobs], folder)
    children[pid] = folder
  codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
  if any(codes):
    raise RuntimeError(f"workers ended with {codes}")
  done = [json.loads((folder / "done.json").read_text()) for folder in children.values()]
  return [each for i in range(len(cases)) for each in done[i % jobs][i // jobs]]


def _work(one, cases: Sequence[Any], folder: pathlib.Path) -> None:
  code = 1
  try:
    done = [one(case, folder) for case in cases]
    (folder / "done.json").write_text(json.dumps(done))
    code = 0
  except BaseException:
    traceback.print_exc()
  finally:
    os._exit(code)
