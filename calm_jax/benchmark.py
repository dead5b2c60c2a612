"""The act of timing: `python -m calm_jax.benchmark --suite=SUITE [--output=FILE]`.

Each suite compares ways to the same result in one run, after compiling; speeds of
different runs or machines are not to be compared.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from calm_jax import cli, config, errors, files
from calm_jax.benchmarking import conversion, decoding, evaluation
from calm_jax.reporting import provenance

# A suite comes in as a row: it returns lines to be read, and its figures.
SUITES: dict[str, Callable[[], tuple[list[str], Any]]] = {
  "eval": evaluation.measure,
  "decode": lambda: decoding.measure(_WORKDIR.value),
  "convert": conversion.measure,
}

_SUITE = flags.DEFINE_string("suite", None, f"What to time: {', '.join(SUITES)}.")
_WORKDIR = flags.DEFINE_string("workdir", "", "The model of --suite=decode.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON file for the figures; by default none.")


def main() -> None:
  suite = _SUITE.value
  if suite not in SUITES:
    raise errors.CalmError(f"--suite is {suite!r}: {config.nearest(str(suite), SUITES)}")
  lines, figures = SUITES[suite]()
  print("\n".join(lines))
  record = {
    "suite": suite,
    "device": jax.devices()[0].device_kind,
    "figures": figures,
    "versions": provenance.versions(),
    "commit": provenance.commit(),
  }
  if _OUTPUT.value:
    files.write(_OUTPUT.value, files.to_json(record))
    print(f"wrote {_OUTPUT.value}", file=sys.stderr)


if __name__ == "__main__":
  cli.run(main)
