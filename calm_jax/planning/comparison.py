"""Plans written as JSON -> a Markdown table of runs and topologies."""

import glob
from collections.abc import Mapping, Sequence
from typing import Any

from calm_jax import config, errors, files
from calm_jax.planning import result
from calm_jax.planning.compiled import topologies

PlanJson = Mapping[str, Any]

_HEADER = (
  "run",
  "slices",
  "layout",
  "fits",
  "peak a chip",
  "state a chip",
  "model TFLOP a chip",
  "program / model FLOPs, padded",
  "ms a step",
  "bound by",
  "M tokens/s",
  "days",
)


def read(patterns: str) -> list[PlanJson]:
  """Returns the plans in the JSON files that globs, separated by commas, match.

  Raises:
    CalmError: if there is no file, or one holds no plan.
  """
  paths = [path for pattern in patterns.split(",") for path in sorted(glob.glob(pattern.strip()))]
  config.require(bool(paths), f"--table={patterns} matches no file: give files of --output")
  plans = [_read(path) for path in paths]
  names = list(dict.fromkeys(plan["facts"]["name"] for plan in plans))
  return sorted(plans, key=lambda plan: (names.index(plan["facts"]["name"]), *_order(plan)))


def _read(path: str) -> PlanJson:
  """Returns the plan in a file; raises CalmError if anything that a row shows is missing."""
  plan = files.read_json(path)
  try:
    _order(plan)
    table([plan])
  except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
    reason = f"{type(error).__name__}: {error}"
    raise errors.CalmError(f"{path} holds no plan ({reason}): give files of --output") from error
  return plan


def _order(plan: PlanJson) -> tuple[int, int]:
  """Returns the sort key of plans of a run: number of chips, then generation."""
  topology = plan["topology"]
  return int(topology["chips"]), list(topologies.CHIPS).index(topology["chip"]["name"])


def table(plans: Sequence[PlanJson]) -> str:
  """Returns a Markdown table, one row per plan; times are for full overlap, and for none."""
  rows = [_HEADER, ("---",) * len(_HEADER), *(_row(plan) for plan in plans)]
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(plan: PlanJson) -> tuple[str, ...]:
  facts, topology = plan["facts"], plan["topology"]
  speeds = (plan["all_overlaps"], plan["nothing_overlaps"])

  def both(name: str, scale: float, digits: int) -> str:
    return " to ".join(f"{speed[name] * scale:,.{digits}f}" for speed in speeds)

  padded = plan["program_flops"] + facts["padding_flops"] / topology["devices"]
  slices = f"{topology['slices']} of " if topology["slices"] > 1 else ""
  available = (plan["overflow"] or {}).get("available", topology["chip"]["usable"])
  return (
    _name(facts["name"]),
    f"{slices}{topology['name']}",
    _layout(facts["choices"]),
    "yes" if plan["fits"] else "NO",
    f"{plan['memory']['peak'] / result.GIB:,.1f} of {available / result.GIB:,.1f} GiB",
    result.gib(facts["state_bytes"]),
    f"{plan['model_flops'] / 1e12:,.1f}",
    f"{plan['program_flops'] / plan['model_flops']:.2f}, {padded / plan['model_flops']:.2f}",
    both("seconds", 1e3, 1),
    plan["roofline"]["bound"],
    both("tokens_per_second", 1e-6, 1),
    both("days", 1, 2),
  )


def _name(name: str) -> str:
  """Returns the config's name and its changed settings, without those of the layout."""
  layout = ("mesh.", "execution.", "training.accumulation=")
  words = (word for word in name.split() if not word.startswith(layout))
  return " ".join(words).removeprefix("configs/")


def _layout(choices: Mapping[str, Any]) -> str:
  """Returns the layout's settings, without 1s and defaults."""
  settings = {name.removeprefix("mesh."): value for name, value in choices.items()}
  settings.pop("attention", None)
  return " ".join(f"{name}={value}" for name, value in settings.items() if value not in (1, "none"))
