"""The act of timing: `python -m calm_jax.benchmark --suite=SUITE [--output=FILE]`.

Each suite compares ways to the same result in one run, after compiling; speeds of
different runs or machines are not to be compared.
"""

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

from absl import flags
from etils import epath

from calm_jax import cli, config, errors, files, run_flags
from calm_jax.benchmarking import (
  contenders,
  conversion,
  data,
  decoding,
  documents,
  evaluation,
  losses,
  training,
)
from calm_jax.reporting import provenance

# A suite comes in as a row: it returns lines to be read, and its figures.
SUITES: dict[str, Callable[[], tuple[list[str], Any]]] = {
  "train": lambda: training.measure(_job(), _CONTENDERS.value),
  "loss": losses.measure,
  "eval": evaluation.measure,
  "data": data.measure,
  "decode": lambda: decoding.measure(_WORKDIR.value),
  "convert": conversion.measure,
}
# Of the environment, what speeds depend on.
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "GLIBC_TUNABLES", "OMP_NUM_THREADS")

_SUITE = flags.DEFINE_string("suite", None, f"What to time: {', '.join(SUITES)}.")
run_flags.define(
  meaning="What --suite=train trains: configs/STAGE.py, with :SIZE; by default models for a CPU."
)
run_flags.define_sizes()
_CONTENDERS = flags.DEFINE_list(
  "contenders",
  [],
  f"Of --suite=train: {', '.join(one.name for one in training.CONTENDERS)}; by default all.",
)
_WORKDIR = flags.DEFINE_string("workdir", "", "The model of --suite=decode.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON file for the figures; by default none.")
_DOCUMENT = flags.DEFINE_string(
  "document", "", "Instead write the lines of the JSON files that this Markdown file names into it."
)


def _job() -> contenders.Job | None:
  run = run_flags.run()
  if run is None:
    return None
  found = run_flags.companions()
  print(run_flags.counted_with(run, found), file=sys.stderr)
  codec = run.model if isinstance(run, config.AutoencoderRun) else found.autoencoder
  return contenders.Job(run_flags.title(), run, codec, found.vocab_size)


def main() -> None:
  if _DOCUMENT.value:
    documents.update(_DOCUMENT.value)
    return
  suite = _SUITE.value
  if suite not in SUITES:
    raise errors.CalmError(f"--suite is {suite!r}: {config.nearest(str(suite), SUITES)}")
  if _OUTPUT.value:  # Before anything is measured.
    files.require_reachable(_OUTPUT.value)
    folder = epath.Path(_OUTPUT.value).parent
    config.require(folder.is_dir(), f"--output={_OUTPUT.value}: there is no folder {folder}")
  lines, figures = SUITES[suite]()
  print("\n".join(lines))
  record = documents.Record(
    command=f"python -m calm_jax.benchmark {shlex.join(sys.argv[1:])}",
    suite=suite,
    commit=provenance.commit(),
    versions=provenance.versions(),
    environment={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    processor=provenance.processor(),
    lines=lines,
    figures=figures,
  )
  if _OUTPUT.value:
    files.write(_OUTPUT.value, files.to_json(dataclasses.asdict(record)))
    print(f"wrote {_OUTPUT.value}", file=sys.stderr)


if __name__ == "__main__":
  cli.run(main)
