"""Claims about settings: bad values are refused with a way out, and every setting is used."""

import dataclasses
import json
import pathlib
import re

import pytest

from calm_jax import config, errors, resolve
from calm_jax.stages import autoencoder as autoencoder_stage
from calm_jax.stages import calm as calm_stage
from calm_jax.stages import table
from calm_jax.stages import transformer as transformer_stage
from calm_jax.training import optimizer

ROOT = pathlib.Path(__file__).parent.parent


def changed(run, path, value):
  """Returns the run as a nested dict with one setting replaced or added."""
  values = resolve.to_config_dict(run).to_dict()
  *parents, name = path.split(".")
  node = values
  for parent in parents:
    node = node[parent]
  node[name] = value
  return values


@pytest.mark.parametrize("run", [autoencoder_stage.Run(), calm_stage.Run()])
def test_a_run_survives_a_round_trip_through_a_config_dict(run):
  assert table.run_from(resolve.to_config_dict(run).to_dict()) == run


@pytest.mark.parametrize(
  ("run", "own"),
  [
    (autoencoder_stage.Run(), ["start_from", "model", "loss"]),
    (calm_stage.Run(), ["autoencoder", "start_from", "model", "head", "loss"]),
    (transformer_stage.Run(), ["start_from", "model"]),
  ],
)
def test_config_json_keeps_the_order_in_which_workdirs_hold_it(run, own: list[str]):
  """Their seals cover the bytes: another order would rewrite config.json on the next start."""
  shared = ["optimizer", "training", "mesh", "execution", "limits", "profile"]
  assert list(json.loads(resolve.to_json(run))) == ["stage", "data", *own, *shared]


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("loss.samples", 1, "config.loss.samples .N. must be at least 2.*got 1"),
    ("loss.alpha", 2.5, r"config.loss.alpha must lie in \(0, 2\], got 2.5"),
    ("loss.alpha", 0.0, r"must lie in \(0, 2\], got 0.0"),
    ("training.batch", 10, None),
    ("model.heads", 3, "config.model.width must be a multiple of 2 \\* heads"),
    ("optimizer.learning_rate", -1.0, "learning_rate must be above 0, got -1.0"),
    ("optimizer.learning_rate", float("nan"), "must be finite"),
    ("optimizer.learning_rate", "fast", "must be of type float, got 'fast'"),
    ("training.steps", True, "must be of type int, got True"),
    ("training.stepz", 5, "unknown setting config.training.stepz: did you mean 'steps'"),
    ("los", {}, "unknown setting config.los: did you mean 'loss'"),
    ("model.init", "fanin", "did you mean 'fan_in'"),
    ("stage", "clam", "did you mean 'calm'"),
    ("data", 5, "config.data must hold settings, got 5"),
    ("training.seed", -1, r"seed must lie in \[0, 2\*\*32\), got -1"),
    ("data.context", 0, "config.data.context must be above 0, got 0"),
  ],
)
def test_a_bad_setting_is_refused_with_its_value_and_a_way_out(path, value, message):
  values = changed(calm_stage.Run(), path, value)
  if message is None:
    table.run_from(values)
    return
  with pytest.raises(errors.CalmError, match=message):
    table.run_from(values)


def test_a_batch_that_accumulation_does_not_divide_is_refused():
  values = changed(calm_stage.Run(), "training.accumulation", 3)
  with pytest.raises(
    errors.CalmError, match="batch must be divisible by accumulation = 3, got 256"
  ):
    table.run_from(values)


def test_an_unknown_schedule_and_a_decay_longer_than_the_run_are_refused():
  with pytest.raises(errors.CalmError, match="did you mean 'cosine'"):
    optimizer.schedule(config.Optimizer(schedule="cosin"), 10)
  with pytest.raises(errors.CalmError, match=r"is more than training\.steps = 10"):
    optimizer.schedule(config.Optimizer(schedule="wsd", warmup_steps=5, decay_steps=6), 10)


def test_differences_name_both_values():
  other = dataclasses.replace(calm_stage.Run(), loss=config.CalmLoss(samples=4))
  assert resolve.differences(calm_stage.Run(), other) == {"loss.samples": (8, 4)}
  assert resolve.differences(other, other) == {}


def settings_fields():
  for run in [spec.run for spec in table.STAGES.values()]:
    for part in dataclasses.fields(run):
      if dataclasses.is_dataclass(part.default_factory):
        yield from ((part.name, field.name) for field in dataclasses.fields(part.default_factory))
      else:
        yield "run", part.name


def test_every_setting_is_read_somewhere():
  """Each field is read as an attribute in a module other than the one that declares it."""
  code = "\n".join(
    path.read_text() for path in (ROOT / "calm_jax").rglob("*.py") if path.name != "config.py"
  )
  unread = {
    f"{part}.{name}" for part, name in settings_fields() if not re.search(rf"\.{name}\b", code)
  }
  assert not unread
