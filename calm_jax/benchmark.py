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
from ml_collections import config_flags

from calm_jax import cli, config, errors, files
from calm_jax.benchmarking import (
  contenders,
  conversion,
  data,
  decoding,
  documents,
  evaluation,
  training,
)
from calm_jax.planning import published
from calm_jax.reporting import provenance

# A suite comes in as a row: it returns lines to be read, and its figures.
SUITES: dict[str, Callable[[], tuple[list[str], Any]]] = {
  "train": lambda: training.measure(_job(), _CONTENDERS.value),
  "eval": evaluation.measure,
  "data": data.measure,
  "decode": lambda: decoding.measure(_WORKDIR.value),
  "convert": conversion.measure,
}
# Of the environment, what speeds depend on.
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "GLIBC_TUNABLES", "OMP_NUM_THREADS")

_SUITE = flags.DEFINE_string("suite", None, f"What to time: {', '.join(SUITES)}.")
_CONFIG = config_flags.DEFINE_config_file(
  "config", None,
  "What --suite=train trains: configs/STAGE.py, with :SIZE; by default small models for a CPU.",
  lock_config=True,
)  # fmt: skip
_AUTOENCODER = config_flags.DEFINE_config_file(
  "autoencoder_config", None, "Sizes of stage two's autoencoder; by default the published ones.",
  lock_config=True,
)  # fmt: skip
_VOCAB = flags.DEFINE_integer(
  "vocab_size", published.VOCAB, "Tokens, with --config; by default Llama 3's.", 3
)
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


def _run(flag: Any, name: str) -> config.Run:
  try:
    return config.from_mapping(flag.value.to_dict())
  except OSError as error:  # What went wrong when the flag was parsed shows here.
    reason = " ".join(str(error).partition("Attempted")[2].split())
    raise errors.CalmError(f"can't load --{name}: {reason}") from error


def _job() -> contenders.Job | None:
  if _CONFIG.value is None:
    return None
  run, codec = _run(_CONFIG, "config"), config.Autoencoder()
  if isinstance(run, config.AutoencoderRun):
    codec = run.model
  elif _AUTOENCODER.value is not None:
    given = _run(_AUTOENCODER, "autoencoder_config")
    if not isinstance(given, config.AutoencoderRun):
      raise errors.CalmError(f"--autoencoder_config is of stage {given.stage!r}: give stage one's")
    codec = given.model
  flag = flags.FLAGS["config"]
  changes = config_flags.get_override_values(flag)
  name = " ".join([
    config_flags.get_config_filename(flag), *(f"{key}={value}" for key, value in changes.items())
  ])  # fmt: skip
  return contenders.Job(name, run, codec, _VOCAB.value)


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
    cores=os.cpu_count(),
    lines=lines,
    figures=figures,
  )
  if _OUTPUT.value:
    files.write(_OUTPUT.value, files.to_json(dataclasses.asdict(record)))
    print(f"wrote {_OUTPUT.value}", file=sys.stderr)


if __name__ == "__main__":
  cli.run(main)
