"""Compiles for TPUs that are not attached: `python -m calm_jax.compile_ahead --config=C ...`.

With `--topology=T`, it compiles the real train step for those chips and reports its memory,
FLOPs, communication and time at published peaks. Nothing is trained. The exit code is 0 if the
step fits the chips, and 2 if it does not fit or the input is bad.
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
_TOPOLOGY = flags.DEFINE_string("topology", "", f"Chip and shape of a slice: {topologies.known()}.")
_SLICES = flags.DEFINE_integer("slices", 1, "Number of slices of that shape.", 1, 2**12)
run_flags.define_sizes()
_EVALUATION = flags.DEFINE_bool("evaluation", False, "Also compile the scoring of held-out text.")
_DECODE = flags.DEFINE_bool("decode", False, "Also compile generation, on one device.")
_TEXTS = flags.DEFINE_integer("texts", 1, "Texts generated at once, with --decode.", 1, 2**16)
_NUM_CANDIDATES = flags.DEFINE_integer(
  "num_candidates",
  1,
  "Maximum draws per patch, with --decode; above 1 implies a temperature below 1.",
  1,
  config.MOST_DRAWS,
)
_CHECK_FLOPS = flags.DEFINE_bool(
  "check_flops",
  False,
  "Instead compare the program's FLOPs, with layers unrolled and scanned, to the analytic count.",
)
_SEARCH = flags.DEFINE_bool(
  "search", False, "Instead compile several layouts and report the fastest that fits."
)
_TRIES = flags.DEFINE_integer("tries", 12, "Maximum number of layouts that --search compiles.", 1)
_TABLE = flags.DEFINE_string(
  "table",
  "",
  "Instead print a Markdown table of plans: JSON files of --output, separated by commas.",
)
_OUTPUT = flags.DEFINE_string("output", "", "JSON file for the figures; by default none.")


def _job() -> steps.PlanJob:
  run = run_flags.run()
  if run is None or not _TOPOLOGY.value:
    raise errors.CalmError("give --config=configs/STAGE.py[:SIZE] and --topology=CHIP:SHAPE")
  companions = run_flags.companions()
  print(run_flags.counted_with(run, companions), file=sys.stderr)
  topology = topologies.parse(_TOPOLOGY.value, _SLICES.value)
  return steps.PlanJob(run_flags.title(), run, topology, companions.vocab_size, companions.parents)


def _write(figures: Mapping[str, Any]) -> None:
  if _OUTPUT.value:
    files.write(_OUTPUT.value, files.to_json(figures))
    print(f"wrote {_OUTPUT.value}", file=sys.stderr)


def _check(job: steps.PlanJob) -> None:
  check = steps.check_flops(job)
  for name, ratio in check.ratios.items():
    print(f"FLOPs of the program, layers {name}, divided by the analytic count: {ratio:.4f}")
  _write({**dataclasses.asdict(check), "ratios": dict(check.ratios)})


def _search(job: steps.PlanJob) -> None:
  layouts = search.search(job, _TRIES.value, lambda line: print(line, file=sys.stderr, flush=True))
  print(search.table(layouts))
  _write({"tried": [layout.figures() for layout in layouts]})
  if not any(layout.fits for layout in layouts):
    raise errors.CalmError(f"none of {len(layouts)} layouts fits: {search.nearest(layouts)}")


def _plan(job: steps.PlanJob) -> None:
  plans = {"train": steps.train_plan(job)}
  print(tables.table(plans["train"]))
  if _EVALUATION.value:
    plans["evaluation"] = steps.evaluation_plan(job)
  if _DECODE.value:
    plans |= steps.decode_plans(job, _TEXTS.value, _NUM_CANDIDATES.value)
  forward_plans = [plan for name, plan in plans.items() if name != "train"]
  if forward_plans:
    print(f"\n{tables.lines(forward_plans)}")
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
