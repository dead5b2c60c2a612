"""Files of a workdir -> an account of its run: settings, figures, evaluation, texts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from calm_jax import config, errors, files, workdir
from calm_jax.reporting import presentation as presentation_lib
from calm_jax.training import ledger

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Account:
  """All that a workdir records of its run.

  Attributes:
    directory: the workdir, as given by the user.
    run: its settings.
    presentation: how its stage is shown.
    generates: whether its stage generates text.
    patch_size: K; None for a stage without patches.
    train, evaluations: reports of the training loop, in order of steps.
    evaluation: contents of evaluation.json, or None.
    tradeoff: contents of temperature.json, or None.
    samples: generated texts.
    notes: sentences on what is missing, unfinished or broken.
  """

  directory: str
  run: Any
  presentation: presentation_lib.Presentation
  generates: bool
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
  """Returns one figure of all records as float64, NaN for those missing or beyond float32."""
  values = [record.get(name) for record in records]
  return np.array([x if _is_number(x) else np.nan for x in values], np.float64)


def tokens_per_second(account: Account) -> float:
  """Returns the median over the training reports. Higher is better; NaN without any."""
  values = column(account.train, "tokens_per_second")
  values = values[np.isfinite(values)]
  return float(np.median(values)) if len(values) else float("nan")


def read(
  directory: str, run: Any, presentation: presentation_lib.Presentation, generates: bool
) -> Account:
  """Returns the account of a workdir.

  Args:
    run: its settings.
    presentation: how its stage is shown.
    generates: whether its stage generates text.

  Raises:
    CalmError: if it is not a workdir, has no training report yet or can't be read.
  """
  path = epath.Path(directory)
  metrics, broken_metrics = _read_lines(path / workdir.METRICS, _is_report)
  samples, broken_samples = _read_lines(path / workdir.SAMPLES, _is_sample)
  evaluation, evaluation_notes = _readable_evaluation(directory, workdir.EVALUATION)
  tradeoff, tradeoff_notes = _readable_evaluation(directory, workdir.TRADEOFF)
  train = [record for record in metrics if record["kind"] == "train"]
  origin = path / "origin.json"
  if not train and origin.exists() and not workdir.read_origin(directory).store_hash:
    raise errors.CalmError(f"{directory} holds imported weights: there is no training to report on")
  if not train:
    raise errors.CalmError(
      f"{directory} has no figures yet: {workdir.METRICS} holds no training report; the first is "
      f"written after {run.training.log_every} steps"
    )
  account = Account(
    directory=directory,
    run=run,
    presentation=presentation,
    generates=generates,
    patch_size=getattr(getattr(run, "model", None), "patch_size", None),
    train=train,
    evaluations=[record for record in metrics if record["kind"] == "evaluation"],
    evaluation=evaluation,
    tradeoff=tradeoff,
    samples=samples,
    notes=(),
  )
  broken = {workdir.METRICS: broken_metrics, workdir.SAMPLES: broken_samples}
  notes = [*_state(account), *_broken(broken), *evaluation_notes, *tradeoff_notes]
  attempts = ledger.unreadable(path)
  if attempts:
    notes.append(f"Attempts whose seconds can't be read and are left out: {attempts}.")
  return dataclasses.replace(account, notes=notes)


def _read_lines(path: epath.Path, is_valid: Callable[[Record], bool]) -> tuple[list[Record], int]:
  """Returns the records of a JSON lines file and the number of broken lines.

  An unreadable last line does not count as broken: it may be only partly written, or was cut
  short by a kill.
  """
  if not path.exists():
    return [], 0
  lines = [line for line in files.read(path).splitlines() if line.strip()]
  records = [_parse(line, is_valid) for line in lines]
  if records and records[-1] is None:
    records.pop()
  readable = [record for record in records if record is not None]
  return readable, len(records) - len(readable)


def _parse(line: bytes, is_valid: Callable[[Record], bool]) -> Record | None:
  try:
    record = files.parse_json(line, "")
  except errors.CalmError:
    return None
  return record if is_valid(record) else None


def _is_report(record: Record) -> bool:
  kind, step = record.get("kind"), record.get("step")
  return (
    isinstance(kind, str)
    and type(step) is int
    and 0 <= step <= config.LARGEST_INT
    and not _wrong_figure(record)
  )


def _is_sample(record: Record) -> bool:
  return all(isinstance(record.get(name), str) for name in ("prompt", "text"))


def read_evaluation(directory: str, name: str = workdir.EVALUATION) -> Record | None:
  """Returns the figures in a file that evaluate writes, None if it does not exist.

  Raises:
    CalmError: if it can't be read, or one of its values can't be a figure.
  """
  path = epath.Path(directory) / name
  if not path.exists():
    return None
  try:
    values = files.read_json(path)
    wrong_name = (_wrong_tradeoff if name == workdir.TRADEOFF else _wrong_figure)(values)
    config.require(
      not wrong_name, f"{path}: {wrong_name!a} can't be {config.shown(values.get(wrong_name))}"
    )
  except errors.CalmError as error:
    raise errors.CalmError(f"{error}; evaluate again") from error
  return values


def _readable_evaluation(directory: str, name: str) -> tuple[Record | None, list[str]]:
  """Returns the result of `read_evaluation`, or None and a note if it can't be read."""
  try:
    return read_evaluation(directory, name), []
  except errors.CalmError as error:
    return None, [f"Figures that are left out: {error}."]


# Entries of a report or an evaluation that are strings, and those that are lists of numbers.
_TEXTS = ("kind", "stage", "data", "store_hash")
_LISTS = ("posterior_std_by_dimension", "kl_by_dimension")


def _is_number(value: Any) -> bool:
  """Returns whether a value can be drawn: a finite number within float32, the computed type."""
  return type(value) in (int, float) and abs(value) <= config.FLOATS[1]


def _is_numbers(value: Any) -> bool:
  return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _wrong_figure(record: Record) -> str:
  """Returns the name of a value that can't be a figure, "" if all can. NaN and inf are figures."""

  def is_figure(name: str, value: Any) -> bool:
    if name in _TEXTS:
      return isinstance(value, str)
    if name in _LISTS:
      return _is_numbers(value) and len(value) == len(record.get(_LISTS[0]) or ())
    return value is None or type(value) is float or _is_number(value)

  return next((name for name, value in record.items() if not is_figure(name, value)), "")


def _wrong_tradeoff(record: Record) -> str:
  """Returns the name of a list whose rows `generation.tradeoff` did not write, "" if none is."""

  def is_row(row: Any) -> bool:
    return (
      isinstance(row, dict)
      and all(isinstance(row.get(name), str) for name in ("rule", "at_limit"))
      and all(_is_number(row.get(name)) for name in ("temperature", "num_candidates", "draws"))
      and all(_is_numbers(row.get(name)) for name in ("accuracy", "accuracy_error", "collision"))
    )

  for name in ("rows", "baseline"):
    rows = record.get(name, [])
    if not isinstance(rows, list) or not all(map(is_row, rows)):
      return name
  return ""


def _state(account: Account) -> list[str]:
  """Returns notes on the progress of the run and on what is missing."""
  notes, steps = [], account.run.training.steps
  if account.step < steps:
    notes.append(f"The run is not finished: {account.step:,} of {steps:,} steps are reported.")
  skipped = np.nanmax([0.0, *column(account.train, "skipped")])
  if skipped:
    notes.append(
      f"Skipped steps: {skipped:,.0f}. Their loss or gradient was not finite, and they changed "
      "no weights; figures that are not finite are gaps in the pictures."
    )
  evaluation = account.best_evaluation
  if evaluation is None:
    notes.append(f"There is no evaluation yet; this command makes one: {account.evaluate_command}")
  elif account.evaluation is None:
    notes.append(
      f"The evaluation is the training loop's, on at most {account.run.training.eval_blocks} "
      f"blocks; this command makes the full one: {account.evaluate_command}"
    )
  elif evaluation.get("step") != account.step:
    notes.append(
      f"The evaluation is of step {evaluation.get('step', 'unknown')}, "
      f"but the last report is of step {account.step}."
    )
  if account.generates and not account.samples:
    notes.append(
      "There is no text yet; this command writes one: python -m calm_jax.generate "
      f"--workdir={account.directory}"
    )
  return notes


def _broken(lines: Mapping[str, int]) -> list[str]:
  return [
    f"Unreadable lines of {name} that are left out: {count}."
    for name, count in lines.items()
    if count
  ]
