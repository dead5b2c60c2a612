"""Makes file system calls of acts fail, one at a time, and runs the acts again without faults.

    python tests/faults.py [--acts=prepare,export,import,train,resume] [--every=1] [--output=FILE]
    python tests/faults.py --only=train/write/7

For every n the n-th write, rename, fsync, read and mkdir of a toy act fails with ENOSPC, EIO or
EACCES; see harm/injection.py for the calls. Then the same command runs again without a fault. A
case ends in one of these ways:

    reported    with one line and exit code 2, or with a line about the fault; a second run recovers
    harmless    with exit code 0 and the result of an undisturbed run
    silent      with exit code 0 and another result
    spoilt      as above, but the second run does not end like an undisturbed one, bit for bit
    left        as above, but the second run leaves temporary files
    traceback   with a traceback, or an exit code without a meaning
    hang        not within --limit seconds

Prints a table and the cases of the last five, and exits with 1 if there are any.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from harm import forked, injection, specimens, workers

# Act -> the specimen that it reads; None for acts that start from nothing.
ACTS = {
  "prepare": None,
  "export": "calm",
  "import": "reference_calm",
  "train": None,
  "resume": "autoencoder",
}
BAD = ("silent", "spoilt", "left", "traceback", "hang")
CLASSES = ("reported", "harmless", *BAD)
OPERATIONS = (*injection.ERRORS, injection.SIZE)
OUTPUTS = ("result", "trace")
# Exit codes with a meaning: success, bad input, restart.
CODES = (0, 2, 75)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a case ended.

  Attributes:
    name: ACT/OPERATION/NUMBER.
    act: name of the act.
    operation: the operation that failed.
    path: path of the failed operation.
    outcome: one of CLASSES.
    stderr: the end of the act's standard error.
  """

  name: str
  act: str
  operation: str
  path: str
  outcome: str
  stderr: str


@dataclasses.dataclass(frozen=True)
class Undisturbed:
  """An act without faults.

  Attributes:
    ending: how it ended.
    trace: its operations and their paths.
    sizes: sizes of the files that it wrote.
    temporary: files that look temporary afterwards.
  """

  ending: forked.Ending
  trace: Sequence[tuple[str, str]]
  sizes: Sequence[int]
  temporary: set[str]


class Bench:
  """Disturbs acts one after another in one folder."""

  def __init__(self, root: pathlib.Path, folder: pathlib.Path, limit: float):
    self._root, self._folder, self._limit = root, folder, limit
    self._undisturbed: dict[str, Undisturbed] = {}

  def _lay(self, act: str) -> specimens.Place:
    place = specimens.Place(self._root, self._folder, ACTS[act] or "store")
    place.lay()
    if ACTS[act] is None:
      specimens.clear(place.case)
    for path in self._folder.iterdir():
      if path.name not in ("case", *OUTPUTS):
        specimens.clear(path)
    return place

  def _run(self, act: str, place: specimens.Place, operation="", number=0) -> forked.Ending:
    """Runs an act with a fault, or without one."""
    command, result = _command(act, place), _result(act, place)
    outputs = [self._folder / name for name in OUTPUTS]
    skipped = [*outputs, self._root / "compiled", place.case / "tensorboard"]
    faults = injection.Faults(self._root, skipped, self._folder / "trace", operation, number)

    def result_without_faults(printed: str) -> Any:
      faults.disarm()
      return result(printed)

    return forked.run(command, self._folder, result_without_faults, faults.install, self._limit)

  def _trace(self) -> list[tuple[str, str]]:
    return [tuple(json.loads(line)) for line in (self._folder / "trace").read_text().splitlines()]

  def _files(self) -> dict[pathlib.Path, tuple[int, int]]:
    """Returns the size and time of every file of an act."""
    paths = (path for path in self._folder.rglob("*") if path.is_file())
    return {
      path: (path.stat().st_size, path.stat().st_mtime_ns)
      for path in paths
      if path.name not in OUTPUTS
    }

  def _temporary(self) -> set[str]:
    """Returns the paths that look temporary."""
    names = (str(path.relative_to(self._folder)) for path in self._folder.rglob("*"))
    return {
      name for name in names if "tmp" in name or name.startswith(".out") or "unfinished" in name
    }

  def undisturbed(self, act: str) -> Undisturbed:
    """Returns how an act ends without faults."""
    if act not in self._undisturbed:
      place = self._lay(act)
      before = self._files()
      ending = self._run(act, place)
      assert ending.code == 0, ending.stderr
      written = self._files().items() - before.items()
      sizes = sorted({size for _, (size, _) in written if size > 1})
      self._undisturbed[act] = Undisturbed(ending, self._trace(), sizes, self._temporary())
    return self._undisturbed[act]

  def numbers(self, act: str, operation: str) -> list[int]:
    """Returns the numbers that a fault of an operation may have."""
    undisturbed = self.undisturbed(act)
    if operation == injection.SIZE:
      return [size - 1 for size in undisturbed.sizes]
    return list(range(1, 1 + sum(name == operation for name, _ in undisturbed.trace)))

  def disturb(self, act: str, operation: str, number: int) -> Outcome:
    """Makes one operation of an act fail and runs the act again."""
    undisturbed = self.undisturbed(act)
    expected = undisturbed.ending
    place = self._lay(act)
    ending = self._run(act, place, operation, number)
    paths = [path for name, path in self._trace() if name == operation]
    has_path = operation != injection.SIZE and number <= len(paths)
    path = paths[number - 1] if has_path else ""
    outcome, stderr = _outcome(ending, expected), ending.stderr
    if outcome in ("reported", "harmless"):
      again = self._run(act, place)
      same = again.result == expected.result if again.code == 0 else False
      if again.code == 2 and "exists already" in again.stderr:  # The first run was complete.
        is_export = act == "export"
        same = _result(act, place)("") == expected.result if is_export else place.out.exists()
      if not same:
        outcome = "spoilt"
        stderr = f"{ending.stderr[-500:]}\n-- again: {again.code}\n{again.stderr}"
      elif left := self._temporary() - undisturbed.temporary:
        outcome, stderr = "left", f"{ending.stderr[-500:]}\n-- left: {sorted(left)[:5]}"
    return Outcome(
      name=f"{act}/{operation}/{number}",
      act=act,
      operation=operation,
      path=path.replace(str(self._folder), ""),
      outcome=outcome,
      stderr=stderr[-1500:],
    )


def _command(act: str, place: specimens.Place) -> forked.Command:
  if act == "train":
    changes = {"training__steps": 2, "training__checkpoint_every": 1}
    store = place.root / "store"
    return specimens.train_command(place.root, "autoencoder", place.case, store, **changes)
  return specimens.ACTS[act].command(place)


def _result(act: str, place: specimens.Place) -> Any:
  if act == "train":
    return lambda printed: specimens.trained(place.case, 2)
  return lambda printed: specimens.ACTS[act].result(place, printed)


def _outcome(ending: forked.Ending, undisturbed: forked.Ending) -> str:
  """Returns the class of the disturbed run, without the second run."""
  if ending.code is None:
    return "hang"
  if "Traceback" in ending.stderr or ending.code not in CODES:
    return "traceback"
  if ending.code == 0:
    if ending.result == undisturbed.result:
      return "harmless"
    return "reported" if forked.reports_more(ending, undisturbed) else "silent"
  lines = [line for line in ending.stderr.splitlines() if line.startswith("error: ")]
  return "reported" if len(lines) == 1 or ending.code == 75 else "traceback"


def run(
  root: pathlib.Path, acts: Sequence[str], every: int, only: Sequence[str], limit: float, jobs: int
) -> list[Outcome]:
  """Disturbs acts at one of `every` operations, or runs only the cases in `only`."""
  root.mkdir(parents=True, exist_ok=True)
  specimens.Builder(root).build()
  first = root / "worker0"
  first.mkdir(exist_ok=True)
  counting = Bench(root, first, limit)
  cases = [case.split("/") for case in only] or [
    (act, operation, number)
    for act in acts
    for operation in OPERATIONS
    for number in counting.numbers(act, operation)[::every]
  ]
  print(f"{len(cases)} cases", file=sys.stderr)
  benches: dict[pathlib.Path, Bench] = {}

  def run_case(case: Sequence[Any], folder: pathlib.Path) -> list[dict]:
    bench = benches.setdefault(folder, Bench(root, folder, limit))
    result = bench.disturb(case[0], case[1], int(case[2]))
    if result.outcome in BAD:
      print(f"{result.outcome}: {result.name}", file=sys.stderr)
    return [dataclasses.asdict(result)]

  return [Outcome(**values) for values in workers.spread(run_case, cases, root, jobs)]


def table(outcomes: Sequence[Outcome]) -> str:
  """Returns the counts by act and operation, as a table."""
  counts: dict[tuple[str, str], collections.Counter[str]] = {}
  for case in outcomes:
    for key in ((case.act, case.operation), ("all", "")):
      counts.setdefault(key, collections.Counter())[case.outcome] += 1
  return specimens.table(("act", "fails", "cases", *CLASSES), counts, CLASSES)


def main() -> int:
  # Not absl's flags, because the acts define flags of the same names.
  parser = argparse.ArgumentParser(description="Makes file system calls of acts fail.")
  parser.add_argument("--acts", default=",".join(ACTS), help="Acts, with commas.")
  parser.add_argument("--every", type=int, default=1, help="Make one of so many operations fail.")
  parser.add_argument("--only", default="", help="Cases as they are printed; no others run.")
  parser.add_argument("--limit", type=float, default=90, help="Time limit of an act in seconds.")
  parser.add_argument("--jobs", type=int, default=2, help="Number of processes.")
  parser.add_argument("--cache", help="Folder of the toys, kept; by default a temporary one.")
  parser.add_argument("--output", help="JSON file of all outcomes.")
  flags = parser.parse_args()
  only = flags.only.split(",") if flags.only else []
  with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(flags.cache or temporary).absolute()
    outcomes = run(root, flags.acts.split(","), flags.every, only, flags.limit, flags.jobs)
  if flags.output:
    values = [dataclasses.asdict(case) for case in outcomes]
    pathlib.Path(flags.output).write_text(json.dumps(values, indent=1))
  bad = sorted((x for x in outcomes if x.outcome in BAD), key=lambda x: BAD.index(x.outcome))
  print(table(outcomes))
  for case in bad:
    last = (case.stderr.strip().splitlines() or [""])[-1][:200]
    print(f"{case.outcome} --only={case.name}: {case.path}: {last}")
  return bool(bad)


if __name__ == "__main__":
  sys.exit(main())
