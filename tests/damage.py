"""Damages stores, workdirs and exported folders, and counts how the acts that read them end.

    python tests/damage.py --count=983 [--seed=0] [--kind=store,workdir,exported] [--output=FILE]
    python tests/damage.py --only=137,autoencoder_swapped

Each case is a new copy of a toy that is damaged in one place: at random (flipped bits, truncation,
zeros, emptying, removal, swaps with another file of its kind, wrong types), or by name
(harm/*_targets.py). A cheap act that reads the place runs on it. It ends in one of these ways:

    reported    with one line and exit code 2, or with a line about the damage
    harmless    with the same result as without damage, bit for bit
    accepted    with a changed figure of a log, or a setting of another framework, that nothing can
                check
    silent      with another result and no message
    traceback   with a traceback, or an exit code without a meaning
    hang        not within --limit seconds plus 20 times the time without damage

Prints a table, and the cases of the last three with their number or name for --only, and exits
with 1 if there are any. A number means the same case for one --seed, --kind and version of the
toys.
"""

import argparse
import collections
import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Sequence

from harm import (
  blows,
  exported_targets,
  forked,
  log_targets,
  specimens,
  store_targets,
  targets,
  workdir_targets,
  workers,
)

# A folder of another framework, in which only the weights have checksums: those of a zip archive.
FOREIGN, SUMMED = "llama_bin", "pytorch_model.bin"
# Their import adds their damage to TARGETS.
TARGETED = (store_targets, workdir_targets, log_targets, exported_targets)
KINDS = {
  "store": ("store", "parts"),
  "workdir": specimens.STAGES,
  "exported": (*specimens.EXPORTS, FOREIGN),
}
BAD = ("silent", "traceback", "hang")
CLASSES = ("reported", "harmless", "accepted", *BAD)
# Files of the past, from which no act computes results.
LOGS = (
  "metrics.jsonl",
  "samples.jsonl",
  "evaluation.json",
  "temperature.json",
  "ledger/",
  "tensorb",
)
# How paths begin -> the acts that read them; cheap acts are listed more often.
READERS: dict[str, Sequence[tuple[str, tuple[str, ...]]]] = {
  "store": (
    ("tokenizer", ("train",)),
    ("plan.json", ("prepare",)),
    ("manifest.json", ("read", "prepare")),
    ("", ("read",)),
  ),
  "workdir": (
    ("metrics.jsonl", ("resume", "report")),
    ("samples.jsonl", ("report", "generate")),
    ("evaluation.json", ("report", "export")),
    ("ledger/", ("resume", "report")),
    ("tokenizer", ("export", "generate")),
    ("autoencoder/", ("export", "export", "evaluate")),
    ("config.json", ("export", "resume", "evaluate", "report")),
    ("origin.json", ("export", "resume", "evaluate", "generate")),
    ("checkpoints/4/params", ("export", "resume")),
    ("", ("resume",)),
  ),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a case ended.

  Attributes:
    name: number or name of the case.
    specimen: name of the specimen.
    place: path of the damaged file; empty for named damage.
    damage: kind of the damage.
    act: name of the act.
    what: description of the damage.
    outcome: one of CLASSES.
    stderr: the end of the act's standard error.
  """

  name: str
  specimen: str
  place: str
  damage: str
  act: str
  what: str
  outcome: str
  stderr: str


def kind_of(specimen: str) -> str:
  return next(kind for kind, names in KINDS.items() if specimen in names)


def act_for(specimen: str, place: str, choice) -> str:
  """Returns an act that reads the file `place` of a specimen, chosen at random."""
  if specimen == "parts":
    return "prepare"
  kind = kind_of(specimen)
  if kind == "exported":
    return "import"
  acts = next(acts for start, acts in READERS[kind] if place.startswith(start))
  if specimen == "autoencoder":  # It generates no text.
    acts = [act for act in acts if act != "generate"]
  return choice.choice(acts)


def outcome(
  ending: forked.Ending, undamaged: forked.Ending, accepted: bool, must_report: bool
) -> str:
  """Returns the class of an ending.

  Args:
    ending: how the act ended on the damaged specimen.
    undamaged: how it ends on the undamaged specimen.
    accepted: whether nothing can check the damaged value.
    must_report: whether damage that does not change the result must be reported too.
  """
  if ending.code is None:
    return "hang"
  if "Traceback" in ending.stderr or ending.code not in (0, 2):
    return "traceback"
  if ending.code == 2:
    lines = [line for line in ending.stderr.splitlines() if line.startswith("error: ")]
    is_last = len(lines) == 1 and ending.stderr.endswith(lines[0] + "\n")
    return "reported" if is_last else "traceback"
  if ending.result == undamaged.result and not must_report:
    return "harmless"
  if forked.reports_more(ending, undamaged):
    return "reported"
  readable = "unreadable" not in (ending.result or {})
  return "accepted" if accepted and readable and not must_report else "silent"


class Bench:
  """Runs cases one after another in one folder."""

  def __init__(self, root: pathlib.Path, folder: pathlib.Path, limit: float):
    self._root, self._folder, self._limit = root, folder, limit
    self._undamaged: dict[tuple[str, str], forked.Ending] = {}

  def _place(self, specimen: str) -> specimens.Place:
    place = specimens.Place(self._root, self._folder, specimen)
    place.lay()
    return place

  def _run(
    self, place: specimens.Place, name: str, limit: float, before=lambda: None
  ) -> forked.Ending:
    act = specimens.ACTS[name]
    return forked.run(
      act.command(place), self._folder, lambda printed: act.result(place, printed), before, limit
    )

  def _limit_of(self, undamaged: forked.Ending) -> float:
    """Returns the time limit of an act; it is longer on a busy machine."""
    return self._limit + 20 * undamaged.seconds

  def undamaged(self, specimen: str, act: str) -> forked.Ending:
    """Returns how an act ends on an undamaged specimen."""
    key = specimen, act
    if key not in self._undamaged:
      ending = self._run(self._place(specimen), act, 10 * self._limit)
      assert ending.code == 0, (key, ending.stderr)
      self._undamaged[key] = ending
    return self._undamaged[key]

  def random(self, seed: int, number: int, names: Sequence[str]) -> Outcome:
    """Runs the case of a number."""
    blow = blows.Blow.choose(self._root, seed, number, names)
    act = act_for(blow.specimen, blow.place, blow.choice)
    undamaged = self.undamaged(blow.specimen, act)
    place = self._place(blow.specimen)
    what = blow.strike(place.case)
    ending = self._run(place, act, self._limit_of(undamaged))
    accepted = blow.place.startswith(LOGS) or (blow.specimen == FOREIGN and blow.place != SUMMED)
    return Outcome(
      name=str(number),
      specimen=blow.specimen,
      place=blow.place,
      damage=blow.damage,
      act=act,
      what=what,
      outcome=outcome(ending, undamaged, accepted, must_report=False),
      stderr=ending.stderr[-1000:],
    )

  def targeted(self, name: str) -> list[Outcome]:
    """Runs the case of a name with each of its acts."""
    target, outcomes = targets.TARGETS[name], []
    for act in target.acts:
      undamaged = self.undamaged(target.specimen, act)
      place = self._place(target.specimen)
      # Runs in the act's process: TensorStore fails in forks of a process that has used it.
      strike = functools.partial(target.strike, place)
      ending = self._run(place, act, self._limit_of(undamaged), strike)
      case = Outcome(
        name=name,
        specimen=target.specimen,
        place="",
        damage="targeted",
        act=act,
        what=target.strike.__doc__ or "",
        outcome=outcome(ending, undamaged, target.accepted, target.must_report),
        stderr=ending.stderr[-1000:],
      )
      outcomes.append(case)
    return outcomes


def run(
  root: pathlib.Path,
  cases: Iterable[int | str],
  seed: int,
  kinds: Sequence[str],
  limit: float,
  jobs: int,
) -> list[Outcome]:
  """Runs cases, numbers or names of targets, in `jobs` processes."""
  root.mkdir(parents=True, exist_ok=True)
  built = specimens.Builder(root).build()
  names = [name for kind in kinds for name in KINDS[kind] if name in built]
  benches: dict[pathlib.Path, Bench] = {}

  def run_case(case: int | str, folder: pathlib.Path) -> list[dict]:
    bench = benches.setdefault(folder, Bench(root, folder, limit))
    if isinstance(case, str):
      if targets.TARGETS[case].specimen not in names:
        return []
      results = bench.targeted(case)
    else:
      results = [bench.random(seed, case, names)]
    for result in results:
      if result.outcome in BAD:
        line = f"{result.outcome}: {result.name}, {result.act} of {result.specimen}"
        print(line, file=sys.stderr)
    return [dataclasses.asdict(result) for result in results]

  return [Outcome(**values) for values in workers.spread(run_case, list(cases), root, jobs)]


def table(outcomes: Sequence[Outcome]) -> str:
  """Returns the counts by kind of specimen and of damage, as a table."""
  counts: dict[tuple[str, str], collections.Counter[str]] = {}
  for case in outcomes:
    for key in ((kind_of(case.specimen), case.damage), ("all", "")):
      counts.setdefault(key, collections.Counter())[case.outcome] += 1
  return specimens.table(("specimen", "damage", "cases", *CLASSES), counts, CLASSES)


def describe(case: Outcome) -> str:
  """Returns a line on a case."""
  lines = case.stderr.strip().splitlines()
  last = lines[-1][:150] if lines and case.outcome != "silent" else ""
  place = f" {case.place}" if case.place else ""
  start = f"{case.outcome} --only={case.name}: {case.act} of {case.specimen}{place}"
  return f"{start}: {case.what} {last}"


def main() -> int:
  # Not absl's flags, because the acts define flags of the same names.
  parser = argparse.ArgumentParser(description="Damages files and runs the acts that read them.")
  parser.add_argument("--count", type=int, default=983, help="Number of random cases.")
  parser.add_argument("--seed", type=int, default=0, help="Seed of the random cases.")
  parser.add_argument("--kind", default=",".join(KINDS), help="Kinds of specimens, with commas.")
  parser.add_argument("--targeted", default="all", help="Names with commas, all or none.")
  parser.add_argument("--only", default="", help="Numbers and names; no other cases run.")
  parser.add_argument("--limit", type=float, default=20, help="Least time limit in seconds.")
  parser.add_argument("--jobs", type=int, default=2, help="Number of processes.")
  parser.add_argument("--cache", help="Folder of the toys, kept; by default a temporary one.")
  parser.add_argument("--output", help="JSON file of all outcomes.")
  flags = parser.parse_args()
  named = {"all": list(targets.TARGETS), "none": []}.get(flags.targeted, flags.targeted.split(","))
  cases: list[int | str] = [*named, *range(flags.count)]
  if flags.only:
    cases = [int(case) if case.isdecimal() else case for case in flags.only.split(",")]
  with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(flags.cache or temporary).absolute()
    outcomes = run(root, cases, flags.seed, flags.kind.split(","), flags.limit, flags.jobs)
  if flags.output:
    values = [dataclasses.asdict(case) for case in outcomes]
    pathlib.Path(flags.output).write_text(json.dumps(values, indent=1))
  bad = [case for case in outcomes if case.outcome in BAD]
  print(table(outcomes))
  print("\n".join(map(describe, sorted(bad, key=lambda case: BAD.index(case.outcome)))))
  return bool(bad)


if __name__ == "__main__":
  sys.exit(main())
