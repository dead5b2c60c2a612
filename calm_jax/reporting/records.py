"""Files of a workdir -> its account: settings, figures over steps, evaluation, texts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from calm_jax import config, errors, files, workdir

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Account:
  """What a workdir tells of its run.

  Attributes:
    directory: as the person named it. run: its settings.
    patch_size: K; None if the frozen autoencoder of stage two is not there, and for the
      baseline.
    train, evaluations: reports of the loop, in order of steps.
    evaluation: evaluation.json, or None. tradeoff: temperature.json, or None.
    samples: written texts.
    notes: sentences on what is missing, unfinished or broken.
  """

  directory: str
  run: config.Run
  patch_size: int | None
  train: Sequence[Record]
  evaluations: Sequence[Record]
  evaluation: Record | None
  tradeoff: Record | None
  samples: Sequence[Record]
  notes: Sequence[str]

  @property
  def step(self) -> int:
    """The last step that was reported."""
    return self.train[-1]["step"]

  @property
  def best_evaluation(self) -> Record | None:
    """evaluation.json, else the loop's last evaluation, else None."""
    return self.evaluation or (self.evaluations[-1] if self.evaluations else None)

  @property
  def evaluate_command(self) -> str:
    """The command that writes evaluation.json."""
    return f"python -m calm_jax.evaluate --workdir={self.directory}"


def column(records: Sequence[Record], name: str) -> np.ndarray:
  """Returns one figure of all records as float64, NaN where it is missing or infinite."""
  values = [record.get(name) for record in records]
  result = np.array([x if isinstance(x, (int, float)) else np.nan for x in values], np.float64)
  return np.where(np.isfinite(result), result, np.nan)


def tokens_per_second(account: Account) -> float:
  """Returns the median over the training reports. Higher is better; NaN without any."""
  values = column(account.train, "tokens_per_second")
  values = values[np.isfinite(values)]
  return float(np.median(values)) if len(values) else float("nan")


def read(directory: str) -> Account:
  """Returns the account of a workdir.

  Raises:
    CalmError: if it is none, has no training report yet or can't be read.
  """
  run = workdir.read_run(directory)
  path = epath.Path(directory)
  try:
    metrics, broken = _read_lines(path / workdir.METRICS, {"kind": str, "step": int})
    samples, broken_samples = _read_lines(path / workdir.SAMPLES, {"prompt": str, "text": str})
    evaluation, no_evaluation = _readable_evaluation(directory, workdir.EVALUATION)
    tradeoff, no_tradeoff = _readable_evaluation(directory, workdir.TRADEOFF)
  except OSError as error:
    raise errors.CalmError(f"can't read workdir {directory}: {error}") from error
  train = [record for record in metrics if record["kind"] == "train"]
  origin = path / "origin.json"
  if not train and origin.exists() and not workdir.read_origin(directory).store_hash:
    raise errors.CalmError(f"{directory} holds imported weights: there is no training to report on")
  if not train:
    raise errors.CalmError(
      f"{directory} has no figures yet: {workdir.METRICS} holds no training report, the first "
      f"comes after {run.training.log_every} steps"
    )
  account = Account(
    directory=directory,
    run=run,
    patch_size=_patch_size(directory, run),
    train=train,
    evaluations=[record for record in metrics if record["kind"] == "evaluation"],
    evaluation=evaluation,
    tradeoff=tradeoff,
    samples=samples,
    notes=(),
  )
  broken_lines = {workdir.METRICS: broken, workdir.SAMPLES: broken_samples}
  return dataclasses.replace(
    account, notes=[*_state(account), *_broken(broken_lines), *no_evaluation, *no_tradeoff]
  )


def _read_lines(path: epath.Path, required: Mapping[str, type]) -> tuple[list[Record], int]:
  """Returns the records of a JSON lines file and how many lines are broken.

  The last line does not count as broken: it may be in the course of writing, or
  was cut by a kill.
  """
  if not path.exists():
    return [], 0
  lines = [line for line in path.read_bytes().splitlines() if line.strip()]
  records = [_parse(line, required) for line in lines]
  if records and records[-1] is None:
    records.pop()
  good = [record for record in records if record is not None]
  return good, len(records) - len(good)


def _parse(line: bytes, required: Mapping[str, type]) -> Record | None:
  try:
    record = files.parse_json(line, "a line")
  except errors.CalmError:
    return None
  complete = all(isinstance(record.get(name), kind) for name, kind in required.items())
  return record if complete else None


def read_evaluation(directory: str, name: str = workdir.EVALUATION) -> Record | None:
  """Returns the figures in a file that evaluate writes, None where there is none.

  Raises:
    CalmError: if it can't be read.
  """
  path = epath.Path(directory) / name
  if not path.exists():
    return None
  try:
    return files.read_json(path)
  except errors.CalmError as error:
    raise errors.CalmError(f"{error}; evaluate again") from error


def _readable_evaluation(directory: str, name: str) -> tuple[Record | None, list[str]]:
  """Returns `read_evaluation`, and a note in place of figures that can't be read."""
  try:
    return read_evaluation(directory, name), []
  except errors.CalmError as error:
    return None, [f"Figures that are left out: {error}."]


def _patch_size(directory: str, run: config.Run) -> int | None:
  if isinstance(run, config.AutoencoderRun):
    return run.model.patch_size
  own = str(epath.Path(directory) / workdir.AUTOENCODER)
  frozen = workdir.read_run(own) if workdir.exists(own) else None
  return frozen.model.patch_size if isinstance(frozen, config.AutoencoderRun) else None


def _state(account: Account) -> list[str]:
  """Returns sentences on how far the run is."""
  notes, steps = [], account.run.training.steps
  if account.step < steps:
    notes.append(f"The run is not finished: {account.step:,} of {steps:,} steps are reported.")
  skipped = np.nanmax([0.0, *column(account.train, "skipped")])
  if skipped:
    notes.append(
      f"Skipped steps: {skipped:,.0f}. Their loss or gradient was not finite and they changed "
      "no weight; figures that are not finite are gaps in the pictures."
    )
  evaluation = account.best_evaluation
  if evaluation is None:
    notes.append(f"There is no evaluation yet; this makes one: {account.evaluate_command}")
  elif account.evaluation is None:
    notes.append(
      f"The evaluation is the loop's own, on {account.run.training.eval_blocks} blocks at most; "
      f"this makes the full one: {account.evaluate_command}"
    )
  elif evaluation.get("step") != account.step:
    notes.append(
      f"The evaluation is of step {evaluation.get('step', 'unknown')}, "
      f"the last report of step {account.step}."
    )
  if not isinstance(account.run, config.AutoencoderRun) and not account.samples:
    notes.append(
      "There is no text yet; this writes one: python -m calm_jax.generate "
      f"--workdir={account.directory}"
    )
  return notes


def _broken(lines: Mapping[str, int]) -> list[str]:
  return [
    f"Unreadable lines of {name} that are left out: {count}."
    for name, count in lines.items()
    if count
  ]
