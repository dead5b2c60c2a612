"""Damages stores, workdirs and exported folders, and counts what those who read them make of it.

    python tests/damage.py --count=983 [--seed=0] [--kind=store,workdir,exported] [--output=FILE]
    python tests/damage.py --only=137,autoencoder_swapped

Each case is a fresh copy of a toy, damaged in one place: by seed (flips, cuts, zeroes, emptying,
removal, swaps with another file of its kind, wrong types), or by name (harm/*_targets.py).
The cheapest act that reads the place runs on it, and what comes of it is

    told        one line and exit code 2, or the act went on and said so in a line
    harmless    the result is that of the undamaged one, bit for bit
    taken       a figure in a log, or a setting of another maker's, is taken as it now stands there:
                there is nothing to check it by
    silent      the result differs and nothing was said
    traceback   a traceback, or an exit code that stands for nothing
    hang        nothing within --limit seconds and 20 times what the undamaged one takes

Prints a table and the cases of the last three, each with the number or name for --only, and exits
with 1 if there are any. Numbers hold for one --seed, --kind and version of the toys.
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

# A folder of another maker, whose weights alone have sums: those of a zip archive.
FOREIGN, SUMMED = "llama_bin", "pytorch_model.bin"
# Importing them has entered their damages.
TARGETED = (store_targets, workdir_targets, log_targets, exported_targets)
KINDS = {
  "store": ("store", "parts"),
  "workdir": specimens.STAGES,
  "exported": (*specimens.EXPORTS, FOREIGN),
}
BAD = ("silent", "traceback", "hang")
CLASSES = ("told", "harmless", "taken", *BAD)
# Files that only tell what was: no act computes from them.
LOGS = (
  "metrics.jsonl",
  "samples.jsonl",
  "evaluation.json",
  "temperature.json",
  "ledger/",
  "tensorb",
)
# Of the part of a specimen that begins so, the acts that read it; the cheapest more often.
READERS: dict[str, Sequence[tuple[str, tuple[str, ...]]]] = {
  "store": (
    ("tokenizer", ("train",)), ("plan.json", ("prepare",)),
    ("manifest.json", ("read", "prepare")), ("", ("read",)),
  ),
  "workdir": (
    ("metrics.jsonl", ("resume", "report")), ("samples.jsonl", ("report", "generate")),
    ("evaluation.json", ("report", "export")), ("ledger/", ("resume", "report")),
    ("tokenizer", ("export", "generate")), ("autoencoder/", ("export", "export", "evaluate")),
    ("config.json", ("export", "resume", "evaluate", "report")),
    ("origin.json", ("export", "resume", "evaluate", "generate")),
    ("checkpoints/4/params", ("export", "resume")),
    ("", ("resume",)),
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of a case: `name` is its number or name, `what` the damage in words."""

  name: str
  specimen: str
  place: str
  damage: str
  act: str
  what: str
  outcome: str
  said: str


def kind_of(specimen: str) -> str:
  return next(kind for kind, names in KINDS.items() if specimen in names)


def act_for(specimen: str, place: str, choice) -> str:
  """An act that reads the file `place` of a specimen."""
  if specimen == "parts":
    return "prepare"
  kind = kind_of(specimen)
  if kind == "exported":
    return "import"
  acts = next(acts for start, acts in READERS[kind] if place.startswith(start))
  if specimen == "autoencoder":  # It writes no text.
    acts = [act for act in acts if act != "generate"]
  return choice.choice(acts)


def outcome(ending: forked.Ending, undamaged: forked.Ending, taken: bool, must_tell: bool) -> str:
  """The class of what became of a damage.

  Args:
    taken: whether there is nothing to check the place by. must_tell: whether the same result
      is not enough.
  """
  if ending.code is None:
    return "hang"
  if "Traceback" in ending.said or ending.code not in (0, 2):
    return "traceback"
  if ending.code == 2:
    lines = [line for line in ending.said.splitlines() if line.startswith("error: ")]
    return "told" if len(lines) == 1 and ending.said.endswith(lines[0] + "\n") else "traceback"
  if ending.result == undamaged.result and not must_tell:
    return "harmless"
  if forked.tells_more(ending, undamaged):
    return "told"
  readable = "unreadable" not in (ending.result or {})
  return "taken" if taken and readable and not must_tell else "silent"


class Bench:
  """One place where cases happen one after another."""

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
      act.command(place), self._folder, lambda said: act.result(place, said), before, limit
    )

  def _limit_of(self, undamaged: forked.Ending) -> float:
    """A busy machine is slow at both."""
    return self._limit + 20 * undamaged.seconds

  def undamaged(self, specimen: str, act: str) -> forked.Ending:
    """How an act ends on an undamaged specimen."""
    key = specimen, act
    if key not in self._undamaged:
      ending = self._run(self._place(specimen), act, 10 * self._limit)
      assert ending.code == 0, (key, ending.said)
      self._undamaged[key] = ending
    return self._undamaged[key]

  def random(self, seed: int, number: int, names: Sequence[str]) -> Outcome:
    """The case of a number."""
    blow = blows.Blow.choose(self._root, seed, number, names)
    act = act_for(blow.specimen, blow.place, blow.choice)
    undamaged = self.undamaged(blow.specimen, act)
    place = self._place(blow.specimen)
    what = blow.strike(place.case)
    ending = self._run(place, act, self._limit_of(undamaged))
    taken = blow.place.startswith(LOGS) or (blow.specimen == FOREIGN and blow.place != SUMMED)
    found = outcome(ending, undamaged, taken, must_tell=False)
    said = ending.said[-1000:]
    return Outcome(str(number), blow.specimen, blow.place, blow.damage, act, what, found, said)

  def targeted(self, name: str) -> list[Outcome]:
    """The case of a name, with each act that it is for."""
    target, outcomes = targets.TARGETS[name], []
    for act in target.acts:
      undamaged = self.undamaged(target.specimen, act)
      place = self._place(target.specimen)
      # In the act's process: TensorStore works in no process forked from one that has used it.
      strike = functools.partial(target.strike, place)
      ending = self._run(place, act, self._limit_of(undamaged), strike)
      found = outcome(ending, undamaged, target.taken, target.must_tell)
      where = target.specimen, target.strike.__doc__ or ""
      outcomes.append(
        Outcome(name, where[0], "", "targeted", act, where[1], found, ending.said[-1000:])
      )
    return outcomes


def run(
  root: pathlib.Path, cases: Iterable[int | str], seed: int, kinds: Sequence[str], limit: float,
  jobs: int,
) -> list[Outcome]:  # fmt: skip
  """Runs cases, numbers or names of targets, in `jobs` processes side by side."""
  root.mkdir(parents=True, exist_ok=True)
  there = specimens.Builder(root).build()
  names = [name for kind in kinds for name in KINDS[kind] if name in there]
  benches: dict[pathlib.Path, Bench] = {}

  def one(case: int | str, folder: pathlib.Path) -> list[dict]:
    bench = benches.setdefault(folder, Bench(root, folder, limit))
    if isinstance(case, str):
      if targets.TARGETS[case].specimen not in names:
        return []
      found = bench.targeted(case)
    else:
      found = [bench.random(seed, case, names)]
    for each in found:
      if each.outcome in BAD:
        print(f"{each.outcome}: {each.name}, {each.act} of {each.specimen}", file=sys.stderr)
    return [dataclasses.asdict(each) for each in found]

  return [Outcome(**each) for each in workers.spread(one, list(cases), root, jobs)]


def table(outcomes: Sequence[Outcome]) -> str:
  """The counts by kind of specimen and of damage."""
  counts: dict[tuple[str, str], collections.Counter[str]] = {}
  for each in outcomes:
    for key in ((kind_of(each.specimen), each.damage), ("all", "")):
      counts.setdefault(key, collections.Counter())[each.outcome] += 1
  return specimens.table(("specimen", "damage", "cases", *CLASSES), counts, CLASSES)


def describe(each: Outcome) -> str:
  lines = each.said.strip().splitlines()
  last = lines[-1][:150] if lines and each.outcome != "silent" else ""
  place = f" {each.place}" if each.place else ""
  return (
    f"{each.outcome} --only={each.name}: {each.act} of {each.specimen}{place}: {each.what} {last}"
  )


def main() -> int:
  # Not absl's flags: those of the acts have the same names.
  parser = argparse.ArgumentParser(description="Damage, and what becomes of it.")
  parser.add_argument("--count", type=int, default=983, help="Random cases.")
  parser.add_argument("--seed", type=int, default=0, help="Of the random cases.")
  parser.add_argument("--kind", default=",".join(KINDS), help="Of specimens, with commas between.")
  parser.add_argument("--targeted", default="all", help="Names with commas between, all or none.")
  parser.add_argument("--only", default="", help="Numbers and names, in place of all others.")
  parser.add_argument("--limit", type=float, default=20, help="Seconds an act may take, at least.")
  parser.add_argument("--jobs", type=int, default=2, help="Cases at once.")
  parser.add_argument("--cache", help="Folder of the toys, made if need be; else a temporary one.")
  parser.add_argument("--output", help="JSON file of all outcomes.")
  given = parser.parse_args()
  named = {"all": list(targets.TARGETS), "none": []}.get(given.targeted, given.targeted.split(","))
  cases: list[int | str] = [*named, *range(given.count)]
  if given.only:
    cases = [int(case) if case.isdecimal() else case for case in given.only.split(",")]
  with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(given.cache or temporary).absolute()
    outcomes = run(root, cases, given.seed, given.kind.split(","), given.limit, given.jobs)
  if given.output:
    values = [dataclasses.asdict(each) for each in outcomes]
    pathlib.Path(given.output).write_text(json.dumps(values, indent=1))
  bad = [each for each in outcomes if each.outcome in BAD]
  print(table(outcomes))
  print("\n".join(map(describe, sorted(bad, key=lambda each: BAD.index(each.outcome)))))
  return bool(bad)


if __name__ == "__main__":
  sys.exit(main())
