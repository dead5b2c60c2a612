"""Counts costs per token: `python -m calm_jax.cost --config=configs/calm.py:m [--temperature=0.5]`.

Prints the cost of training and of generation per token, by part of the model, next to a
Transformer of about equal quality, and the generation time per token on a chip at its published
peaks. All figures are computed from the model's sizes; nothing is run.
"""

import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from calm_jax import cli, config, errors, files, run_flags
from calm_jax.generation import candidates, cost, requests, rules, temperature
from calm_jax.planning import published, writing
from calm_jax.planning.compiled import topologies
from calm_jax.running import counting, untrained
from calm_jax.stages import table

run_flags.define()
run_flags.define(
  "baseline", "Model to compare with; by default the published Transformer of equal quality."
)
run_flags.define_sizes()
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Temperature of CALM, in (0, 1].")
_NUM_CANDIDATES = flags.DEFINE_integer(
  "num_candidates", 200, "N, draws per patch below temperature 1; by default the paper's.", 1
)
_RULE = flags.DEFINE_enum(
  "rule",
  None,
  (requests.Sampler.rule, rules.DIRECT),
  "Rule below temperature 1; by default direct for the config of a tempered head, otherwise first. "
  "With direct a tempered head makes one draw; give --draws below the temperatures that it was "
  "trained for.",
)
_DRAWS = flags.DEFINE_float(
  "draws",
  0.0,
  "Mean draws per patch below temperature 1, if a rule settles patches before N draws; measured by "
  "evaluate --temperatures; by default N.",
)
_BATCH = flags.DEFINE_integer("batch", 1, "Texts generated at once.", 1)
_CHIP = flags.DEFINE_enum("chip", "v5e", list(topologies.CHIPS), "Chip that generates.")
_PUBLISHED = flags.DEFINE_bool(
  "published",
  False,
  "Instead print the published costs, our count of them by the paper's rules, and the true costs.",
)
_OUTPUT = flags.DEFINE_string("output", "", "JSON file for the figures; by default none.")


def _require_writing(run: Any, name: str) -> None:
  spec = table.of(run)
  if spec.writing is None:
    raise errors.CalmError(f"--{name} is of {spec.title}, which generates no text")


def _job(run: Any, companions: config.Companions) -> cost.WritingJob:
  """Returns the generation to count; a stage that samples exactly takes one draw per patch."""
  spec, draws, rounds, is_direct = table.of(run), 1.0, 1, False
  if spec.writing and spec.writing.takes_candidates:
    request = requests.Request((), _TEMPERATURE.value, _NUM_CANDIDATES.value)
    is_tempered = temperature.power(request.temperature) != 1
    is_direct = is_tempered and (_RULE.value or spec.writing.rule) == rules.DIRECT
    if is_tempered:
      draws = _DRAWS.value or (1.0 if is_direct else float(request.num_candidates))
      config.require(
        1 <= draws <= request.num_candidates,
        f"--draws must lie in [1, num_candidates = {request.num_candidates}], got {draws}",
      )
    rounds = -(-draws * _BATCH.value // max(candidates.ROUND, _BATCH.value))
  return cost.WritingJob(
    run,
    untrained.parent_runs(run, companions.parents),
    companions.vocab_size,
    positions=run.data.context // spec.patch_size(run),
    draws=draws,
    rounds=rounds,
    batch=_BATCH.value,
    is_direct=is_direct,
  )


def _equal(run: Any) -> Any | None:
  """Returns the published Transformer that equals a published CALM in quality, else None."""
  rows = [row for row in published.ROWS if row.name in published.EQUALS]
  equals = [published.EQUALS[row.name].run for row in rows if row.run.model == run.model]
  return equals[0] if equals else None


def _table(title: str, unit: str, columns: dict[str, dict[str, float]]) -> list[str]:
  """Returns a table's lines: one row per part and a total, one column per model, in millions."""
  names = list(dict.fromkeys(part for parts in columns.values() for part in parts))
  lines = [f"{title:26}" + "".join(f"{name:>22}" for name in columns)]
  for name in [*names, "total"]:
    cells = []
    for parts in columns.values():
      total = sum(parts.values())
      value = total if name == "total" else parts.get(name)
      cells.append("" if value is None else f"{value / 1e6:,.2f} {unit} {value / total:5.0%}")
    lines.append(f"  {name:24}" + "".join(f"{cell:>22}" for cell in cells))
  return lines


def _figures(name: str, run, companions: config.Companions) -> dict[str, Any]:
  """Returns a model's costs per token: training FLOPs; FLOPs, bytes and seconds of generation."""
  job, chip = _job(run, companions), topologies.CHIPS[_CHIP.value]
  parts = writing.parts(job)
  seconds, bound = writing.seconds(parts, chip)
  return {
    "name": name,
    "training_flops": counting.train_parts(run, job.parents, job.vocab_size),
    "writing_flops": {part.name: part.flops for part in parts},
    "writing_bytes": {part.name: part.bytes for part in parts},
    "draws": job.draws,
    "seconds": seconds,
    "bound": bound,
  }


def _published() -> tuple[list[str], Any]:
  """Returns the lines and figures of --published."""
  lines = [
    f"{'':14}{'training, 1e20 FLOPs':>34}{'writing a token, 1e8 FLOPs':>34}"
    f"{'true: T = 1':>14}{'200 draws':>12}",
    f"{'':14}" + 2 * f"{'published':>12}{'by its count':>13}{'':>9}" + f"{'1e8':>14}{'1e8':>12}",
  ]
  figures = []
  for row in published.ROWS:
    counted = published.counted_training(row), published.counted_writing(row)
    true = [published.true_writing(row, draws) for draws in (1, row.draws)]
    lines.append(
      f"{row.name:14}{row.training / 1e20:12.1f}{counted[0] / 1e20:13.2f}"
      f"{counted[0] / row.training - 1:+9.1%}{row.writing / 1e8:12.1f}{counted[1] / 1e8:13.2f}"
      f"{counted[1] / row.writing - 1:+9.1%}{true[0] / 1e8:14.2f}{true[1] / 1e8:12.1f}"
    )
    figures.append(
      {
        "name": row.name,
        "training": row.training,
        "writing": row.writing,
        "counted_training": counted[0],
        "counted_writing": counted[1],
        "true_writing": true[0],
        "true_writing_200_draws": true[1],
      }
    )
  return lines, figures


def _cost() -> tuple[list[str], Any]:
  """Returns the lines and figures of --config and the model that it is compared with."""
  run = run_flags.run()
  if run is None:
    raise errors.CalmError("give --config=configs/STAGE.py[:SIZE]")
  _require_writing(run, "config")
  companions = run_flags.companions()
  print(run_flags.counted_with(run, companions), file=sys.stderr)
  baseline = run_flags.run("baseline")
  if baseline is not None:
    _require_writing(baseline, "baseline")
  equal = _equal(run) if baseline is None else None
  name = config_flags.get_config_filename(flags.FLAGS["config"])
  models = [_figures(name, run, companions)]
  for label, compared in (("baseline", baseline), ("equal quality", equal)):
    if compared is not None:
      models.append(_figures(label, compared, companions))
  draws = f"{models[0]['draws']:g} draw{'s' * (models[0]['draws'] != 1)} a patch"
  lines = []
  for title, unit, figure in (
    ("training, a token", "MFLOP", "training_flops"),
    (f"writing, {draws}", "MFLOP", "writing_flops"),
    (f"writing, batch {_BATCH.value}", "MB", "writing_bytes"),
  ):
    lines += [*_table(title, unit, {model["name"]: model[figure] for model in models}), ""]
  for model in models:
    lines.append(
      f"{model['name']}: {1e6 * model['seconds']:,.1f} us a token of one text on a {_CHIP.value} "
      f"at its peaks, bound by {model['bound']}"
    )
  return lines, models


def main() -> None:
  lines, figures = _published() if _PUBLISHED.value else _cost()
  print("\n".join(lines))
  if _OUTPUT.value:
    files.write(_OUTPUT.value, files.to_json({"models": figures}))
    print(f"wrote {_OUTPUT.value}", file=sys.stderr)


if __name__ == "__main__":
  cli.run(main)
