"""Plans written as JSON -> a Markdown table of runs and topologies."""

import glob
from collections.abc import Mapping, Sequence
from typing import Any

from calm_jax import config, errors, files
from calm_jax.planning import result, topologies

Written = Mapping[str, Any]

_HEADER = (
  "run", "slices", "layout", "fits", "peak a chip", "state a chip", "model TFLOP a chip",
  "program / model FLOPs, padded", "ms a step", "bound by", "M tokens/s", "days",
)  # fmt: skip


def read(patterns: str) -> list[Written]:
  """Returns the plans in JSON files, globs with commas between.

  Raises:
    CalmError: where there is none, or one is no plan.
  """
  paths = [path for pattern in patterns.split(",") for path in sorted(glob.glob(pattern.strip()))]
  config.require(bool(paths), f"--table={patterns} matches no file: give files of --output")
  found = [_read(path) for path in paths]
  names = list(dict.fromkeys(plan["facts"]["name"] for plan in found))
  return sorted(found, key=lambda plan: (names.index(plan["facts"]["name"]), *_place(plan)))


def _read(path: str) -> Written:
  """Returns the plan in a file; CalmError where any of it that a row tells is missing."""
  plan = files.read_json(path)
  try:
    _place(plan)
    table([plan])
  except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
    reason = f"{type(error).__name__}: {error}"
    raise errors.CalmError(f"{path} holds no plan ({reason}): give files of --output") from error
  return plan


def _place(plan: Written) -> tuple[int, int]:
  """Returns what plans of a run are ordered by: the number of chips, and their kind."""
  topology = plan["topology"]
  return int(topology["chips"]), list(topologies.CHIPS).index(topology["chip"]["name"])


def table(plans: Sequence[Written]) -> str:
  """Returns a row a plan; times are told if all overlaps and if nothing does."""
  rows = [_HEADER, ("---",) * len(_HEADER), *(_row(plan) for plan in plans)]
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(plan: Written) -> tuple[str, ...]:
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
  """Returns the config's name, with what was changed of it besides the layout."""
  layout = ("mesh.", "execution.", "training.accumulation=")
  words = (word for word in name.split() if not word.startswith(layout))
  return " ".join(words).removeprefix("configs/")


def _layout(choices: Mapping[str, Any]) -> str:
  """Returns what a reader has to know of the layout, 1s and defaults left out."""
  told = {name.removeprefix("mesh."): value for name, value in choices.items()}
  told.pop("attention", None)
  return " ".join(f"{name}={value}" for name, value in told.items() if value not in (1, "none"))
