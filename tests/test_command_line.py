"""Claims about flags: --help tells all of them, and a slip in any ends in a line that names it."""

import dataclasses
import pathlib
import re

import acts
import pytest

from calm_jax import config

ROOT = pathlib.Path(__file__).parent.parent
QUICKSTART = "--config=configs/calm.py:quickstart"


def defined(act: str) -> set[str]:
  """The flags of ours that an act has, by its code."""
  code = (ROOT / f"calm_jax/{act}.py").read_text()
  found = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", code))
  if "run_flags.define(" in code:
    found |= {"config", *re.findall(r"run_flags\.define\(\s*\"(\w+)\"", code)}
  if "run_flags.define_sizes()" in code:
    found |= {"autoencoder_config", "vocab_size"}
  return found


def slips(name: str) -> set[str]:
  """A flag's name with a letter too few, and with two in turn."""
  middle = len(name) // 2
  turned = name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
  return {name[:middle] + name[middle + 1 :], turned} - {name}


HELP = [["--help"], ["--helpfull"], ["--verbosity", "0", "--help", "--no_such_flag"]]
CONFIG_HELP = [[QUICKSTART, "--help"], ["--help", "--config.training.lr=1", QUICKSTART]]
# Words of `main`, and what is told of them.
WRONG = {
  (QUICKSTART, "--config.training.lr=1e-3"): (
    "--config.training.lr: no such setting; nearest: --config.optimizer.learning_rate"
  ),
  (QUICKSTART, "--config.step=5"): "--config.step: no such setting; nearest: --config.head.steps, "
  "--config.profile.steps, --config.training.steps",
  (QUICKSTART, "--config.training.steps=abc"): "--config.training.steps=abc must be an integer",
  (QUICKSTART, "--config.mesh.fsdp=1.5"): "--config.mesh.fsdp=1.5 must be an integer",
  (QUICKSTART, "--config.loss.alpha=x"): "--config.loss.alpha=x must be a number",
  (QUICKSTART, "--config.data.reuse_batch=x"): "--config.data.reuse_batch=x must be true or false",
  (QUICKSTART, "--config.model.width"): "--config.model.width needs a value: give "
  "--config.model.width=VALUE",
  (QUICKSTART, "--config.head=5"): "--config.head holds settings: give --config.head.NAME=VALUE, "
  "where NAME is of blocks, kind, noise, steps",
  (QUICKSTART, "--cofig.head.blocks=5"): "--cofig.head.blocks: no such flag; nearest: "
  "--config.head.blocks",
  ("--config.head.blocks=5",): "--config.head.blocks is a setting of a config file: give "
  "--config=FILE before it",
  ("--config.head.blocks=5", QUICKSTART): "--config.head.blocks is a setting of a config file: "
  "give --config=FILE before it",
  ("--config=configs/clam.py", "--config.head.blocks=5"): "--config=configs/clam.py: no such file; "
  "nearest: configs/calm.py",
  ("--config=configs/calm.py:xs",): "can't load --config=configs/calm.py:xs: unknown size 'xs': "
  "known: l, m, quickstart, xl",
  ("--num_processes=0",): "--num_processes=0 must be a positive integer",
  ("--dry_run=perhaps",): "--dry_run=perhaps must be true or false",
  ("--nodry_run=3",): "--nodry_run takes no value, got '3'",
  ("--nodry_rnu",): "--nodry_rnu: no such flag; nearest: --nodry_run",
  ("--zzzz=3",): "--zzzz: no such flag; --help lists all",
  ("--workdir",): "--workdir needs a value: give --workdir=VALUE",
}
SIZES = "--vocab_size=1024", "--autoencoder_config=configs/autoencoder.py:quickstart"
OF_K = [QUICKSTART, "--config.model.patch_size=8"]
# Command lines of acts: first one that is counted with its size's own, last one of another K.
COUNTED = {
  "prepare": [[], ["--input=x"]],
  "cost": [
    [QUICKSTART], ["--chip=v6"], [QUICKSTART, *SIZES], [QUICKSTART, "--vocab_size=512"], OF_K,
  ],
  "compile_ahead": [[QUICKSTART, "--topology=v0:1x1"], [*OF_K, "--topology=v5e:2x2"]],
  "benchmark": [
    [QUICKSTART, "--suite=train", "--contenders=none"], [*OF_K, "--suite=train"],
  ],
}  # fmt: skip


@pytest.fixture(scope="module")
def ended() -> dict[str, dict[tuple[str, ...], acts.Ended]]:
  """How each act ends, by its words."""
  commands = {
    act: [
      *HELP,
      *([*CONFIG_HELP] if "config" in defined(act) else []),
      *([slip] for name in sorted(defined(act)) for slip in map("--{}=1".format, slips(name))),
      *([list(words) for words in WRONG] if act == "main" else []),
      *COUNTED.get(act, []),
    ]
    for act in acts.ACTS
  }
  found = acts.run(commands, str(ROOT))
  return {
    act: dict(zip(map(tuple, commands[act]), map(tuple, found[act]), strict=True))
    for act in acts.ACTS
  }


@pytest.mark.parametrize("act", acts.ACTS)
def test_help_tells_every_flag_of_the_act_and_ends_well(act: str, ended):
  for words in HELP:
    code, told, complained = ended[act][tuple(words)]
    assert (code, complained) == (0, "")
    flags = set(re.findall(r"^  (?:-\w,)?--(?:\[no\])?(\w+):", told, re.MULTILINE))
    assert defined(act) <= flags
  if "config" in defined(act):
    assert "--config=configs/calm.py:quickstart --help" in ended[act][tuple(HELP[0])][1]


@pytest.mark.parametrize("act", ["main", "benchmark", "cost", "compile_ahead"])
def test_help_beside_a_config_lists_its_settings(act: str, ended):
  for words in CONFIG_HELP:
    code, told, complained = ended[act][tuple(words)]
    assert (code, complained) == (0, "")
    assert "  --config.head.blocks=2\n      residual blocks" in told
    assert told.count("\n  --config.") == len(config.flat(dataclasses.asdict(config.CalmRun())))


@pytest.mark.parametrize("act", acts.ACTS)
def test_a_slip_in_any_flag_ends_in_a_line_that_names_it(act: str, ended):
  for name in defined(act):
    for slip in slips(name):
      code, told, complained = ended[act][(f"--{slip}=1",)]
      assert (code, told) == (2, ""), complained
      assert re.fullmatch(rf"error: --{slip}: no such flag; nearest: .*--{name}\b.*\n", complained)


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_with_a_flag_is_told_in_one_line(words: tuple[str, ...], ended):
  assert ended["main"][words] == (2, "", f"error: {WRONG[words]}\n")


def test_flags_that_must_be_given_are_named(ended):
  rest = "--output=..., --tokenizer=...: --help tells what they are\n"
  assert ended["prepare"][()] == (2, "", f"error: give --input=..., {rest}")
  assert ended["prepare"][("--input=x",)] == (2, "", f"error: give {rest}")


def test_a_choice_that_is_none_names_the_nearest(ended):
  code, _, told = ended["cost"][("--chip=v6",)]
  assert code == 2 and told.startswith("error: --chip is 'v6': did you mean 'v6e'? known: 7x, ")


def test_a_size_is_counted_with_the_vocabulary_and_the_autoencoder_that_go_with_it(ended):
  line = "vocabulary 1,024 (--vocab_size); autoencoder of K = 4, width 192, latent 64 "
  for act in ("cost", "compile_ahead", "benchmark"):
    assert ended[act][tuple(COUNTED[act][0])][2].startswith(line), act
  plain = ended["cost"][(QUICKSTART,)]
  assert plain[0] == 0 and plain[1] == ended["cost"][(QUICKSTART, *SIZES)][1]
  assert plain[1] != ended["cost"][(QUICKSTART, "--vocab_size=512")][1]


@pytest.mark.parametrize("act", ["cost", "compile_ahead", "benchmark"])
def test_a_plan_for_another_k_than_its_autoencoders_names_both(act: str, ended):
  code, out, told = ended[act][tuple(COUNTED[act][-1])]
  assert (code, out) == (2, "")
  assert told.startswith(
    "error: config.model.patch_size is 8, but the autoencoder of this size has K = 4 tokens"
  )
