"""Reports on training runs: `python -m calm_jax.report --workdir=W1,W2 [--output=DIR]`.

Writes report.html, one self-contained page on all workdirs. Given both stages, it also writes
their final figures to summary.json and prints them as a table.
"""

import sys
from collections.abc import Container, Sequence

from absl import flags

from calm_jax import cli, errors
from calm_jax.reporting import page, records, summary
from calm_jax.running import accounts as accounts_lib
from calm_jax.stages import table

_WORKDIR = flags.DEFINE_list("workdir", None, "Folders of training runs, separated by commas.")
_OUTPUT = flags.DEFINE_string(
  "output", "", "Folder of report.html and summary.json; by default the first workdir."
)
_SECONDS_TOTAL = flags.DEFINE_float(
  "seconds_total", None, "Seconds of the complete pipeline, for the summary.", 0.0
)


def _note(line: str) -> None:
  print(f"report: {line}", file=sys.stderr)


def _summarize(accounts: Sequence[records.Account], output: str) -> None:
  by_stage: dict[str, records.Account] = {}
  for account in accounts:
    if by_stage.setdefault(account.run.stage, account) is not account:
      _note(f"{account.directory} is not in the summary: it holds the first workdir of each stage")
  family = _family(by_stage)
  missing = [stage for stage in family if stage not in by_stage]
  if missing:
    _note(f"no {summary.FILE}: it needs both stages, but no workdir is of stage {missing[0]!r}")
    return
  figures = summary.summarize([by_stage[stage] for stage in family], _SECONDS_TOTAL.value)
  summary.write(figures, output)
  print(summary.table(figures))


def _family(stages: Container[str]) -> list[str]:
  """Returns a stage that has parents, preceded by them; one in `stages` if possible."""
  children = [name for name, spec in table.STAGES.items() if spec.parents]
  child = next((name for name in children if name in stages), children[0])
  return [*table.STAGES[child].parents.values(), child]


def main() -> None:
  """Reports on the flags' workdirs."""
  directories = _WORKDIR.value
  if not directories:
    raise errors.CalmError("give --workdir=W1,W2, folders of training runs")
  output = _OUTPUT.value or directories[0]
  accounts = [accounts_lib.read(directory) for directory in directories]
  _note(f"wrote {page.write(accounts, output)}")
  _summarize(accounts, output)


if __name__ == "__main__":
  cli.run(main)
