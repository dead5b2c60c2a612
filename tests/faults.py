"""Fails the file system under acts, one call after another, and runs them again without faults.

    python tests/faults.py [--acts=prepare,export,import,train,resume] [--every=1] [--output=FILE]
    python tests/faults.py --only=train/write/7

For every n the n-th write, rename, fsync, read and mkdir of a toy act fails with ENOSPC, EIO or
EACCES; see harm/injection.py for which calls those are. Then the same command runs again. An act
may

    told        end with 2 and one line, or go on and say so; the second run makes up for it
    harmless    end with 0 and the result of an undisturbed run
    silent      end with 0 and another result
    spoilt      end well, but the second run does not end as an undisturbed one, bit for bit
    left        leave temporary files behind that the second run did not clear away
    traceback   end with a traceback, or an exit code that stands for nothing
    hang        not end within --limit seconds

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

# The specimen that an act finds; none for those that begin with nothing.
ACTS = {
  "prepare": None, "export": "calm", "import": "reference_calm", "train": None,
  "resume": "autoencoder",
}  # fmt: skip
BAD = ("silent", "spoilt", "left", "traceback", "hang")
CLASSES = ("told", "harmless", *BAD)
OPERATIONS = (*injection.ERRORS, injection.SIZE)
OUTPUTS = ("result", "trace")
# Exit codes that stand for something: done, bad input, start again.
CODES = (0, 2, 75)


@dataclasses.dataclass(frozen=True)
class Outcome:
  name: str
  act: str
  operation: str
  path: str
  outcome: str
  said: str


@dataclasses.dataclass(frozen=True)
class Whole:
  """An undisturbed act: how it ended, its operations, the sizes it wrote, what looks left over."""

  ending: forked.Ending
  trace: Sequence[tuple[str, str]]
  sizes: Sequence[int]
  usual: set[str]


class Bench:
  """One place where acts are disturbed one after another."""

  def __init__(self, root: pathlib.Path, folder: pathlib.Path, limit: float):
    self._root, self._folder, self._limit = root, folder, limit
    self._whole: dict[str, Whole] = {}

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
    """Runs an act with a fault, or none."""
    command, result = _command(act, place), _result(act, place)
    others = [self._folder / name for name in OUTPUTS]
    skipped = [*others, self._root / "compiled", place.case / "tensorboard"]
    faults = injection.Faults(self._root, skipped, self._folder / "trace", operation, number)

    def undisturbed(printed: str) -> Any:
      faults.disarm()
      return result(printed)

    return forked.run(command, self._folder, undisturbed, faults.install, self._limit)

  def _trace(self) -> list[tuple[str, str]]:
    return [tuple(json.loads(line)) for line in (self._folder / "trace").read_text().splitlines()]

  def _files(self) -> dict[pathlib.Path, tuple[int, int]]:
    """The size and time of every file that is an act's."""
    found = (path for path in self._folder.rglob("*") if path.is_file())
    return {
      path: (path.stat().st_size, path.stat().st_mtime_ns)
      for path in found
      if path.name not in OUTPUTS
    }

  def _temporary(self) -> set[str]:
    """What looks like a leftover."""
    names = (str(path.relative_to(self._folder)) for path in self._folder.rglob("*"))
    return {
      name for name in names if "tmp" in name or name.startswith(".out") or "unfinished" in name
    }

  def whole(self, act: str) -> Whole:
    """How an act ends undisturbed."""
    if act not in self._whole:
      place = self._lay(act)
      before = self._files()
      ending = self._run(act, place)
      assert ending.code == 0, ending.said
      written = self._files().items() - before.items()
      sizes = sorted({size for _, (size, _) in written if size > 1})
      self._whole[act] = Whole(ending, self._trace(), sizes, self._temporary())
    return self._whole[act]

  def numbers(self, act: str, operation: str) -> list[int]:
    """What may be given as the number of a fault."""
    whole = self.whole(act)
    if operation == injection.SIZE:
      return [size - 1 for size in whole.sizes]
    return list(range(1, 1 + sum(name == operation for name, _ in whole.trace)))

  def disturb(self, act: str, operation: str, number: int) -> Outcome:
    """Fails one operation of an act and runs the act again."""
    undisturbed = self.whole(act)
    whole, usual = undisturbed.ending, undisturbed.usual
    place = self._lay(act)
    ending = self._run(act, place, operation, number)
    met = (
      []
      if operation == injection.SIZE
      else [path for name, path in self._trace() if name == operation]
    )
    path = met[number - 1] if number <= len(met) else ""
    found, said = _first(ending, whole), ending.said
    if found in ("told", "harmless"):
      again = self._run(act, place)
      same = again.result == whole.result if again.code == 0 else False
      if again.code == 2 and "exists already" in again.said:  # It was whole all the same.
        same = _result(act, place)("") == whole.result if act == "export" else place.out.exists()
      if not same:
        found, said = "spoilt", f"{ending.said[-500:]}\n-- again: {again.code}\n{again.said}"
      elif left := self._temporary() - usual:
        found, said = "left", f"{ending.said[-500:]}\n-- left: {sorted(left)[:5]}"
    name = f"{act}/{operation}/{number}"
    return Outcome(name, act, operation, path.replace(str(self._folder), ""), found, said[-1500:])


def _command(act: str, place: specimens.Place) -> forked.Command:
  if act == "train":
    return specimens.train_command(
      place.root, "autoencoder", place.case, place.root / "store",
      training__steps=2, training__checkpoint_every=1,
    )  # fmt: skip
  return specimens.ACTS[act].command(place)


def _result(act: str, place: specimens.Place) -> Any:
  if act == "train":
    return lambda printed: specimens.trained(place.case, 2)
  return lambda printed: specimens.ACTS[act].result(place, printed)


def _first(ending: forked.Ending, whole: forked.Ending) -> str:
  """The class of the disturbed run alone."""
  if ending.code is None:
    return "hang"
  if "Traceback" in ending.said or ending.code not in CODES:
    return "traceback"
  if ending.code == 0:
    if ending.result == whole.result:
      return "harmless"
    return "told" if forked.tells_more(ending, whole) else "silent"
  lines = [line for line in ending.said.splitlines() if line.startswith("error: ")]
  return "told" if len(lines) == 1 or ending.code == 75 else "traceback"


def run(
  root: pathlib.Path, acts: Sequence[str], every: int, only: Sequence[str], limit: float, jobs: int
) -> list[Outcome]:
  """Disturbs acts at every n-th of their operations, or at those in `only`."""
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

  def one(case: Sequence[Any], folder: pathlib.Path) -> list[dict]:
    bench = benches.setdefault(folder, Bench(root, folder, limit))
    found = bench.disturb(case[0], case[1], int(case[2]))
    if found.outcome in BAD:
      print(f"{found.outcome}: {found.name}", file=sys.stderr)
    return [dataclasses.asdict(found)]

  return [Outcome(**each) for each in workers.spread(one, cases, root, jobs)]


def table(outcomes: Sequence[Outcome]) -> str:
  """The counts by act and operation."""
  counts: dict[tuple[str, str], collections.Counter[str]] = {}
  for each in outcomes:
    for key in ((each.act, each.operation), ("all", "")):
      counts.setdefault(key, collections.Counter())[each.outcome] += 1
  return specimens.table(("act", "fails", "cases", *CLASSES), counts, CLASSES)


def main() -> int:
  # Not absl's flags: those of the acts have the same names.
  parser = argparse.ArgumentParser(description="Faults of the file system, and what comes of them.")
  parser.add_argument("--acts", default=",".join(ACTS), help="With commas between.")
  parser.add_argument("--every", type=int, default=1, help="Every so many operations one fails.")
  parser.add_argument("--only", default="", help="Cases as they are printed, in place of all.")
  parser.add_argument("--limit", type=float, default=90, help="Seconds an act may take.")
  parser.add_argument("--jobs", type=int, default=2, help="Cases at once.")
  parser.add_argument("--cache", help="Folder of the toys, made if need be; else a temporary one.")
  parser.add_argument("--output", help="JSON file of all outcomes.")
  given = parser.parse_args()
  only = given.only.split(",") if given.only else []
  with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(given.cache or temporary).absolute()
    outcomes = run(root, given.acts.split(","), given.every, only, given.limit, given.jobs)
  if given.output:
    values = [dataclasses.asdict(each) for each in outcomes]
    pathlib.Path(given.output).write_text(json.dumps(values, indent=1))
  bad = sorted((x for x in outcomes if x.outcome in BAD), key=lambda x: BAD.index(x.outcome))
  print(table(outcomes))
  for each in bad:
    last = (each.said.strip().splitlines() or [""])[-1][:200]
    print(f"{each.outcome} --only={each.name}: {each.path}: {last}")
  return bool(bad)


if __name__ == "__main__":
  sys.exit(main())
