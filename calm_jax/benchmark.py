"""Times a suite of benchmarks: `python -m calm_jax.benchmark --suite=SUITE [--output=FILE]`.

Each suite times several implementations of the same computation in one run, without compilation.
Speeds of different runs or machines are not comparable. The suites are not part of the wheel:
they are in `benchmarks/` of a checkout, which an editable install finds.
"""

import dataclasses
import importlib
import os
import pathlib
import shlex
import sys
from collections.abc import Callable
from typing import Any

from absl import flags
from etils import epath

from calm_jax import cli, config, errors, files
from calm_jax.reporting import provenance

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


def _module(name: str) -> Any:
  """Returns a module of benchmarks/.

  It is imported when used: PyTorch's process imports this file too, and must not import JAX.

  Raises:
    CalmError: if the package was installed without the folder.
  """
  if not (FOLDER / f"{name}.py").is_file():
    raise errors.CalmError(
      f"the wheel has no benchmarks, and {FOLDER} does not exist: clone the repository and "
      "install it with pip install -e ."
    )
  if sys.path[0] != str(FOLDER.parent):
    sys.path.insert(0, str(FOLDER.parent))  # Spawned processes inherit it.
  return importlib.import_module(f"benchmarks.{name}")


# Suite -> function that returns the lines to print, and the figures for JSON.
SUITES: dict[str, Callable[[], tuple[list[str], Any]]] = {
  "train": lambda: _module("training").measure(_job(), _CONTENDERS.value),
  "loss": lambda: _module("losses").measure(),
  "eval": lambda: _module("evaluation").measure(),
  "data": lambda: _module("data").measure(),
  "decode": lambda: _module("decoding").measure(_WORKDIR.value),
  "convert": lambda: _module("conversion").measure(),
}
# Environment variables that affect speed.
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "GLIBC_TUNABLES", "OMP_NUM_THREADS")

_SUITE = flags.DEFINE_string("suite", None, f"What to time: {', '.join(SUITES)}.")
if __name__ != "__mp_main__":  # Spawned processes import this file; PyTorch's must not import JAX.
  from calm_jax import run_flags

  run_flags.define(
    meaning="What --suite=train trains: configs/STAGE.py, with :SIZE; by default models for a CPU."
  )
  run_flags.define_sizes()
_CONTENDERS = flags.DEFINE_list(
  "contenders",
  [],
  "What --suite=train compares, of calm_jax, PyTorch and PyTorch compiled; by default all.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Workdir of the model that --suite=decode generates with."
)
_OUTPUT = flags.DEFINE_string("output", "", "JSON file for the figures; by default none.")
_DOCUMENT = flags.DEFINE_string(
  "document", "", "Instead update this Markdown file from the JSON files that it names."
)


def _job() -> Any:
  """Returns the job of --config, or None without it."""
  from calm_jax import run_flags

  run = run_flags.run()
  if run is None:
    return None
  companions = run_flags.companions()
  print(run_flags.counted_with(run, companions), file=sys.stderr)
  parents = run_flags.parents(run, companions)
  return _module("jobs").BenchmarkJob(run_flags.title(), run, parents, companions.vocab_size)


def main() -> None:
  if _DOCUMENT.value:
    _module("documents").update(_DOCUMENT.value)
    return
  suite = _SUITE.value
  if suite not in SUITES:
    raise errors.CalmError(f"--suite is {suite!r}: {config.nearest(str(suite), SUITES)}")
  if _OUTPUT.value:  # Fails before anything is measured.
    files.require_reachable(_OUTPUT.value)
    folder = epath.Path(_OUTPUT.value).parent
    config.require(folder.is_dir(), f"--output={_OUTPUT.value}: there is no folder {folder}")
  lines, figures = SUITES[suite]()
  print("\n".join(lines))
  record = _module("documents").Record(
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
