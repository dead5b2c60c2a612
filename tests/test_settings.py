"""Claims about help on settings: each has a meaning, and errors suggest the name that was meant."""

import dataclasses
import re

import pytest

from calm_jax import config, errors, resolve, settings
from calm_jax.kernels import attention
from calm_jax.models import remat
from calm_jax.models.heads import registry
from calm_jax.stages import calm as calm_stage
from calm_jax.stages import table
from calm_jax.training import optimizer

RUNS = pytest.mark.parametrize(
  "run", [cls() for cls in [spec.run for spec in table.STAGES.values()]]
)


def names(run: config.Run) -> list[str]:
  return list(resolve.flat(dataclasses.asdict(run)))


@RUNS
def test_each_setting_and_each_section_has_a_meaning(run: config.Run):
  sections = list(settings.sections(type(run)))
  listed = [setting for section in sections for setting in section.settings]
  assert sorted(setting.name for setting in listed) == sorted(names(run))
  assert all(section.meaning for section in sections)
  for setting in listed:
    assert setting.meaning.endswith(".") and not setting.meaning.startswith("as in"), setting.name


@RUNS
def test_each_meaning_belongs_to_a_setting(run: config.Run):
  parts = [getattr(run, field.name) for field in dataclasses.fields(run)]
  for part in [run, *(part for part in parts if dataclasses.is_dataclass(part))]:
    fields = {name: getattr(part, name) for name in vars(part)}
    own = {name for name, value in fields.items() if not dataclasses.is_dataclass(value)}
    assert set(settings.meanings(type(part))) == own, type(part)


def test_meanings_name_every_choice():
  rows = {
    "head.kind": registry.HEADS,
    "optimizer.schedule": optimizer.SCHEDULES,
    "execution.attention": [*attention.KERNELS, "auto"],
    "execution.remat": remat.POLICIES,
  }
  meaning_of = {
    setting.name: setting.meaning
    for section in settings.sections(calm_stage.Run)
    for setting in section.settings
  }
  for name, known in rows.items():
    assert set(known) <= set(re.findall(r"\w+", meaning_of[name])), name


def test_the_list_has_each_setting_as_a_flag_with_its_value_and_meaning():
  run = dataclasses.replace(calm_stage.Run(), head=config.Head(blocks=7))
  text = settings.listed(dataclasses.asdict(run), "config", "configs/some.py:size")
  lines = text.splitlines()
  assert lines[0].startswith("settings of configs/some.py:size")
  assert max(map(len, lines)) <= settings.WIDTH
  place = lines.index("  --config.head.blocks=7")
  assert lines[place + 1].strip().startswith("residual blocks")
  flags = re.findall(r"^  --config\.([\w.]+)=", text, re.MULTILINE)
  assert sorted(flags) == sorted(names(run))
  assert "One of bfloat16, float32." in text


@pytest.mark.parametrize(
  ("name", "meant"),
  [
    ("training.lr", "optimizer.learning_rate"),
    ("lr", "optimizer.learning_rate"),
    ("optimizer.wd", "optimizer.weight_decay"),
    ("step", "training.steps"),
    ("steps", "training.steps"),
    ("trainig.steps", "training.steps"),
    ("training.batch_size", "training.batch"),
    ("model.num_layers", "model.layers"),
    ("training.warmup", "optimizer.warmup_steps"),
    ("model.width.of", "model.width"),
    ("data.Context", "data.context"),
  ],
)
def test_a_misplaced_or_abbreviated_name_suggests_what_was_meant(name: str, meant: str):
  message = settings.unknown(name, dataclasses.asdict(calm_stage.Run()), "config")
  assert message.startswith("no such setting; nearest: ")
  assert f"--config.{meant}" in re.split(r"[ ,]+", message)


@RUNS
def test_a_missing_letter_or_two_swapped_letters_still_suggest_the_setting(run: config.Run):
  values = dataclasses.asdict(run)
  for name in names(run):
    section, dot, last = name.rpartition(".")
    middle = len(last) // 2
    for slip in (last[:middle] + last[middle + 1 :], f"{last[0]}{last[2:1:-1]}{last[1]}{last[3:]}"):
      if slip != last and len(last) > 3:
        message = settings.unknown(f"{section}{dot}{slip}", values, "config")
        assert f"--config.{name}" in re.split(r"[ ,]+", message), (slip, message)


def test_a_name_like_no_other_gets_a_list_or_a_way_to_one():
  values = dataclasses.asdict(calm_stage.Run())
  assert "--config.loss has samples, targets, posterior_draws, alpha" in settings.unknown(
    "loss.qqq", values, "config"
  )
  assert "add --help after --config" in settings.unknown("qqq", values, "config")


@pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")  # In ml_collections.
@pytest.mark.parametrize(
  ("code", "message"),
  [
    ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ("def get_config(:", "SyntaxError: "),
    ("def get_config(size=''):\n  raise ValueError('one\\ntwo')", "ValueError: one two"),
    ("def get_config(size=''):\n  return {}['m']", "KeyError: 'm'"),
    ("def get_config(size=''):\n  pass", "its get_config returns nothing"),
  ],
)
def test_a_config_file_that_fails_is_reported_in_one_line_with_its_error(tmp_path, code, message):
  (tmp_path / "own.py").write_text(code)
  file = f"{tmp_path}/own.py:m"
  with pytest.raises(errors.CalmError) as caught:
    settings.load("config", file)
  line = str(caught.value)
  assert line.startswith(f"can't load --config={file}: {message}") and "\n" not in line


def test_a_missing_config_file_suggests_the_nearest():
  with pytest.raises(
    errors.CalmError, match=r"configs/clam.py:m: no such file; nearest: .*calm.py"
  ):
    settings.load("config", "configs/clam.py:m")
