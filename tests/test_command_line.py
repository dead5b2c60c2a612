"""Claims about flags: --help lists all of them, and a mistake in any ends in one line about it."""

import dataclasses
import pathlib
import re
import sys

import acts
import processes
import pytest

from calm_jax import resolve
from calm_jax.stages import calm as calm_stage

ROOT = pathlib.Path(__file__).parent.parent
QUICKSTART = "--config=configs/calm.py:quickstart"


def defined(act: str) -> set[str]:
  """Returns the names of the flags that an act's code defines."""
  code = (ROOT / f"calm_jax/{act}.py").read_text()
  names = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", code))
  if "run_flags.define(" in code:
    names |= {"config", *re.findall(r"run_flags\.define\(\s*\"(\w+)\"", code)}
  if "run_flags.define_sizes()" in code:
    names |= {"autoencoder_config", "vocab_size"}
  return names


def slips(name: str) -> set[str]:
  """Returns a flag's name with a letter missing, and with two letters swapped."""
  middle = len(name) // 2
  swapped = name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
  return {name[:middle] + name[middle + 1 :], swapped} - {name}


HELP = [["--help"], ["--helpfull"], ["--verbosity", "0", "--help", "--no_such_flag"]]
CONFIG_HELP = [[QUICKSTART, "--help"], ["--help", "--config.training.lr=1", QUICKSTART]]
# Words of `main` -> the error message.
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
  "where NAME is one of blocks, kind, noise, steps",
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
# Command lines of acts. The first of an act uses the companions of its size, the last another K.
COUNTED = {
  "prepare": [[], ["--input=x"]],
  "cost": [
    [QUICKSTART],
    ["--chip=v6"],
    [QUICKSTART, *SIZES],
    [QUICKSTART, "--vocab_size=512"],
    OF_K,
  ],
  "compile_ahead": [[QUICKSTART, "--topology=v0:1x1"], [*OF_K, "--topology=v5e:2x2"]],
  "benchmark": [[QUICKSTART, "--suite=train", "--contenders=none"], [*OF_K, "--suite=train"]],
}


@pytest.fixture(scope="module")
def ended() -> dict[str, dict[tuple[str, ...], acts.Ended]]:
  """Act -> its words -> its exit code and outputs."""
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
  results = acts.run(commands, str(ROOT))
  return {
    act: dict(zip(map(tuple, commands[act]), map(tuple, results[act]), strict=True))
    for act in acts.ACTS
  }


@pytest.mark.parametrize("act", acts.ACTS)
def test_help_lists_every_flag_of_the_act_and_exits_with_0(act: str, ended):
  for words in HELP:
    code, output, complaint = ended[act][tuple(words)]
    assert (code, complaint) == (0, "")
    flags = set(re.findall(r"^  (?:-\w,)?--(?:\[no\])?(\w+):", output, re.MULTILINE))
    assert defined(act) <= flags
  if "config" in defined(act):
    assert "--config=configs/calm.py:quickstart --help" in ended[act][tuple(HELP[0])][1]


@pytest.mark.parametrize("act", ["main", "benchmark", "cost", "compile_ahead"])
def test_help_with_a_config_lists_its_settings(act: str, ended):
  for words in CONFIG_HELP:
    code, output, complaint = ended[act][tuple(words)]
    assert (code, complaint) == (0, "")
    assert "  --config.head.blocks=2\n      residual blocks" in output
    assert output.count("\n  --config.") == len(resolve.flat(dataclasses.asdict(calm_stage.Run())))


@pytest.mark.parametrize("act", acts.ACTS)
def test_a_slip_in_any_flag_ends_in_a_line_that_suggests_the_flag(act: str, ended):
  for name in defined(act):
    for slip in slips(name):
      code, output, complaint = ended[act][(f"--{slip}=1",)]
      assert (code, output) == (2, ""), complaint
      assert re.fullmatch(rf"error: --{slip}: no such flag; nearest: .*--{name}\b.*\n", complaint)


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_flag_is_reported_in_one_line(words: tuple[str, ...], ended):
  assert ended["main"][words] == (2, "", f"error: {WRONG[words]}\n")


def test_missing_required_flags_are_named(ended):
  rest = "--output=..., --tokenizer=...; see --help\n"
  assert ended["prepare"][()] == (2, "", f"error: give --input=..., {rest}")
  assert ended["prepare"][("--input=x",)] == (2, "", f"error: give {rest}")


@pytest.mark.parametrize("act", ["prepare", "cost"])  # Without and with a config flag.
def test_an_unreadable_flag_file_is_reported_in_one_line(act: str, tmp_path: pathlib.Path):
  (tmp_path / "binary").write_bytes(b"\xff")
  for file, reason in (
    (tmp_path / "missing", f"can't read --flagfile={tmp_path}/missing: No such file or directory"),
    (tmp_path / "binary", "can't read a --flagfile: it is not UTF-8 text"),
  ):
    words = (sys.executable, "-m", f"calm_jax.{act}", f"--flagfile={file}")
    processes.refused(words, reason)


def test_an_unknown_choice_suggests_the_nearest(ended):
  code, _, complaint = ended["cost"][("--chip=v6",)]
  assert code == 2
  assert complaint.startswith("error: --chip is 'v6': did you mean 'v6e'? known: 7x, ")


def test_a_size_is_counted_with_its_own_vocabulary_and_autoencoder(ended):
  line = "vocabulary 1,024 (--vocab_size); autoencoder of K = 4, width 192, latent 64 "
  for act in ("cost", "compile_ahead", "benchmark"):
    assert ended[act][tuple(COUNTED[act][0])][2].startswith(line), act
  plain = ended["cost"][(QUICKSTART,)]
  assert plain[0] == 0 and plain[1] == ended["cost"][(QUICKSTART, *SIZES)][1]
  assert plain[1] != ended["cost"][(QUICKSTART, "--vocab_size=512")][1]


@pytest.mark.parametrize("act", ["cost", "compile_ahead", "benchmark"])
def test_a_plan_for_another_k_than_its_autoencoders_names_both(act: str, ended):
  code, output, complaint = ended[act][tuple(COUNTED[act][-1])]
  assert (code, output) == (2, "")
  assert complaint.startswith(
    "error: config.model.patch_size is 8, but the autoencoder of this size has K = 4 tokens"
  )
