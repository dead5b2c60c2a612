"""Claims about settings as people read them: each has a meaning, and a slip names the one meant."""

import dataclasses
import re

import pytest

from calm_jax import config, errors, settings
from calm_jax.models import attention, heads, remat
from calm_jax.training import optimizer

RUNS = pytest.mark.parametrize("run", [cls() for cls in config.RUNS.values()])


def names(run: config.Run) -> list[str]:
  return list(config.flat(dataclasses.asdict(run)))


@RUNS
def test_each_setting_and_each_section_has_a_meaning(run: config.Run):
  found = list(settings.sections(type(run)))
  assert sorted(one.name for section in found for one in section.settings) == sorted(names(run))
  for section in found:
    assert section.meaning, section.name
    for one in section.settings:
      assert one.meaning.endswith(".") and not one.meaning.startswith("as in"), one.name


@RUNS
def test_each_meaning_is_of_a_setting(run: config.Run):
  parts = [getattr(run, field.name) for field in dataclasses.fields(run)]
  for part in [run, *(part for part in parts if dataclasses.is_dataclass(part))]:
    fields = {name: getattr(part, name) for name in vars(part)}
    own = {name for name, value in fields.items() if not dataclasses.is_dataclass(value)}
    assert set(settings.meanings(type(part))) == own, type(part)


def test_meanings_name_every_row_that_can_be_chosen():
  rows = {
    "head.kind": heads.HEADS,
    "optimizer.schedule": optimizer.SCHEDULES,
    "execution.attention": [*attention.KERNELS, "auto"],
    "execution.remat": remat.POLICIES,
  }
  told = {
    one.name: one for section in settings.sections(config.CalmRun) for one in section.settings
  }
  for name, known in rows.items():
    words = set(re.findall(r"\w+", told[name].meaning))
    assert set(known) <= words, name


def test_the_list_has_each_setting_as_a_flag_with_its_value_and_its_meaning():
  run = dataclasses.replace(config.CalmRun(), head=config.Head(blocks=7))
  text = settings.listed(dataclasses.asdict(run), "config", "configs/some.py:size")
  lines = text.splitlines()
  assert (
    lines[0].startswith("settings of configs/some.py:size")
    and max(map(len, lines)) <= settings.WIDTH
  )
  place = lines.index("  --config.head.blocks=7")
  assert lines[place + 1].strip().startswith("residual blocks")
  flags = re.findall(r"^  --config\.([\w.]+)=", text, re.MULTILINE)
  assert sorted(flags) == sorted(names(run))
  assert "One of bfloat16, float32." in text


@pytest.mark.parametrize(
  ("given", "meant"),
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
def test_a_name_in_the_wrong_place_or_cut_short_names_what_was_meant(given: str, meant: str):
  told = settings.unknown(given, dataclasses.asdict(config.CalmRun()), "config")
  assert told.startswith("no such setting; nearest: ")
  assert f"--config.{meant}" in re.split(r"[ ,]+", told)


@RUNS
def test_a_letter_too_few_or_two_in_turn_still_name_the_setting(run: config.Run):
  values = dataclasses.asdict(run)
  for name in names(run):
    section, dot, last = name.rpartition(".")
    middle = len(last) // 2
    for slip in (last[:middle] + last[middle + 1 :], f"{last[0]}{last[2:1:-1]}{last[1]}{last[3:]}"):
      if slip != last and len(last) > 3:
        told = settings.unknown(f"{section}{dot}{slip}", values, "config")
        assert f"--config.{name}" in re.split(r"[ ,]+", told), (slip, told)


def test_what_resembles_nothing_names_where_all_are_listed():
  values = dataclasses.asdict(config.CalmRun())
  assert "--config.loss has samples, targets, posterior_draws, alpha" in settings.unknown(
    "loss.qqq", values, "config"
  )
  assert "with --help beside --config" in settings.unknown("qqq", values, "config")


@pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")  # Of ml_collections.
@pytest.mark.parametrize(
  ("code", "told"),
  [
    ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ("def get_config(:", "SyntaxError: "),
    ("def get_config(size=''):\n  raise ValueError('one\\ntwo')", "ValueError: one two"),
    ("def get_config(size=''):\n  return {}['m']", "KeyError: 'm'"),
    ("def get_config(size=''):\n  pass", "its get_config returns nothing"),
  ],
)
def test_a_config_file_that_fails_is_told_in_one_line_with_what_it_raised(tmp_path, code, told):
  (tmp_path / "own.py").write_text(code)
  file = f"{tmp_path}/own.py:m"
  with pytest.raises(errors.CalmError) as caught:
    settings.load("config", file)
  line = str(caught.value)
  assert line.startswith(f"can't load --config={file}: {told}") and "\n" not in line


def test_a_config_file_that_is_not_there_names_the_nearest():
  with pytest.raises(
    errors.CalmError, match=r"configs/clam.py:m: no such file; nearest: .*calm.py"
  ):
    settings.load("config", "configs/clam.py:m")
