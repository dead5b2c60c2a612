"""The act of compiling ahead: `python -m calm_jax.compile_ahead --config=C --topology=T`.

Compiles the real train step for TPUs that are not there and tells what it takes: memory,
FLOPs, what is sent, and the time at published peaks. Nothing is trained or written.
The exit code is 0 where the step fits, 2 where it does not, and for bad input.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from calm_jax import cli, config, errors, files, run_flags
from calm_jax.planning import comparison, search, steps, tables
from calm_jax.planning.compiled import topologies

run_flags.define()
_TOPOLOGY = flags.DEFINE_string(
  "topology", "", f"Chips and the shape of a slice: {topologies.known()}."
)
_SLICES = flags.DEFINE_integer("slices", 1, "Slices of that shape.", 1, 2**12)
run_flags.define_sizes()
_EVALUATION = flags.DEFINE_bool("evaluation", False, "Also the scoring of held-out text.")
_DECODE = flags.DEFINE_bool("decode", False, "Also the writing of text, on one device.")
_TEXTS = flags.DEFINE_integer("texts", 1, "Texts written at once, with --decode.", 1, 2**16)
_NUM_CANDIDATES = flags.DEFINE_integer(
  "num_candidates", 1, "Draws a patch, with --decode; above 1 as below temperature 1.",
  1, config.MOST_DRAWS,
)  # fmt: skip
_CHECK_FLOPS = flags.DEFINE_bool(
  "check_flops", False,
  "Instead compare the program's FLOPs, layers unrolled and looped over, with the analytic count.",
)  # fmt: skip
_SEARCH = flags.DEFINE_bool(
  "search", False, "Instead try layouts, and tell which fits and is fastest."
)
_TRIES = flags.DEFINE_integer("tries", 12, "Layouts that --search compiles at most.", 1)
_TABLE = flags.DEFINE_string(
  "table", "", "Instead print a Markdown table of plans: JSON files of --output, with commas."
)
_OUTPUT = flags.DEFINE_string("output", "", "JSON file for the figures; by default none.")


def _job() -> steps.PlanJob:
  run = run_flags.run()
  if run is None or not _TOPOLOGY.value:
    raise errors.CalmError("give --config=configs/STAGE.py[:SIZE] and --topology=CHIP:SHAPE")
  found = run_flags.companions()
  print(run_flags.counted_with(run, found), file=sys.stderr)
  topology = topologies.parse(_TOPOLOGY.value, _SLICES.value)
  return steps.PlanJob(run_flags.title(), run, topology, found.vocab_size, found.parents)


def _write(figures: Mapping[str, Any]) -> None:
  if _OUTPUT.value:
    files.write(_OUTPUT.value, files.to_json(figures))
    print(f"wrote {_OUTPUT.value}", file=sys.stderr)


def _check(job: steps.PlanJob) -> None:
  check = steps.check_flops(job)
  for name, ratio in check.ratios.items():
    print(f"FLOPs of the program, layers {name}, by the analytic count: {ratio:.4f}")
  _write({**dataclasses.asdict(check), "ratios": dict(check.ratios)})


def _search(job: steps.PlanJob) -> None:
  found = search.search(job, _TRIES.value, lambda line: print(line, file=sys.stderr, flush=True))
  print(search.table(found))
  _write({"tried": [one.figures() for one in found]})
  if not any(one.fits for one in found):
    raise errors.CalmError(f"none of {len(found)} layouts fits: {search.nearest(found)}")


def _plan(job: steps.PlanJob) -> None:
  plans = {"train": steps.train_plan(job)}
  print(tables.table(plans["train"]))
  if _EVALUATION.value:
    plans["evaluation"] = steps.evaluation_plan(job)
  if _DECODE.value:
    plans |= steps.decode_plans(job, _TEXTS.value, _NUM_CANDIDATES.value)
  others = [plan for name, plan in plans.items() if name != "train"]
  if others:
    print(f"\n{tables.lines(others)}")
  figures = {name: json.loads(plan.to_json()) for name, plan in plans.items()}
  _write(figures.pop("train") | figures)
  for plan in plans.values():
    if not plan.fits:
      raise errors.CalmError(plan.refusal())


def main() -> None:
  if _TABLE.value:
    print(comparison.table(comparison.read(_TABLE.value)))
    return
  job = _job()
  if _CHECK_FLOPS.value:
    _check(job)
  elif _SEARCH.value:
    _search(job)
  else:
    _plan(job)


if __name__ == "__main__":
  cli.run(main)
