"""Claims about bad input: it ends in one line on standard error and code 2, and changes nothing."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import acts
import folders
import jax
import numpy as np
import pytest
import tokenizers
from jax import numpy as jnp

from calm_jax import config, errors, prepare, workdir
from calm_jax.data import pipeline
from calm_jax.data import store as store_lib
from calm_jax.data import tokenizer as tokenizer_lib
from calm_jax.interchange import reading
from calm_jax.running import loading, train
from calm_jax.training import trained as trained_lib

ROOT = pathlib.Path(__file__).parent.parent


def changed(run: config.Run, **parts) -> config.Run:
  """Returns a run with settings replaced: changed(run, data={"context": 30})."""
  return dataclasses.replace(
    run, **{part: dataclasses.replace(getattr(run, part), **new) for part, new in parts.items()}
  )


def refused(run: config.Run, directory: pathlib.Path, reason: str) -> None:
  with pytest.raises(errors.CalmError, match=reason) as caught:
    train.train_run(run, str(directory))
  assert "\n" not in str(caught.value)
  assert not workdir.exists(str(directory))


@pytest.fixture
def other_tokens(tokens: str, tmp_path: pathlib.Path) -> str:
  """A store with another tokenizer."""
  (tmp_path / "dogs.jsonl").write_text(
    "".join(json.dumps({"text": f"{i} dogs bark at {i * i} dogs."}) + "\n" for i in range(200))
  )
  settings = prepare.Settings(
    (f"{tmp_path}/dogs.jsonl",), f"{tmp_path}/store", "train:290", heldout=0.3, workers=1
  )
  return prepare.prepare(settings).path


@pytest.fixture(scope="module")
def nothing_heldout(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> str:
  """A store of the same tokenizer that was prepared with --heldout=0."""
  folder = tmp_path_factory.mktemp("nothing_heldout")
  (folder / "cats.txt").write_text("Cats said meow, then ate. " * 20)
  settings = prepare.Settings(
    (f"{folder}/cats.txt",), f"{folder}/store", f"{tokens}/tokenizer.model", heldout=0.0, workers=1
  )
  return prepare.prepare(settings).path


def test_a_store_without_a_held_out_split_if_evaluations_are_due_is_refused(
  autoencoder_run, nothing_heldout, tmp_path, capfd
):
  run = changed(autoencoder_run, data={"path": nothing_heldout})
  reason = "has no held-out split.* --heldout=0.02, or train with --config.training.eval_every=0"
  refused(run, tmp_path / "new", reason)
  run = changed(run, training={"eval_every": 0})
  train.train_run(run, str(tmp_path / "new"), train.Options(dry_run=True))
  output = capfd.readouterr().err
  assert "the train split of" in output and "fewer than 20" in output
  assert "heldout split" not in output


def test_a_store_whose_tokenizer_was_swapped_is_refused(autoencoder_run, tokens, tmp_path):
  store = shutil.copytree(tokens, tmp_path / "store")
  with (store / "tokenizer.model").open("ab") as file:
    file.write(b"x")
  run = changed(autoencoder_run, data={"path": str(store)})
  refused(run, tmp_path / "new", "tokenizer.model has SHA-256")


def test_splits_of_few_blocks_cause_a_warning(tokens):
  store = store_lib.TokenStore.open(tokens)
  heldout = store.num_tokens("heldout")
  assert heldout < store.num_tokens("train") and not pipeline.few_blocks_warnings(store, 32, True)
  context = heldout // 19
  (line,) = pipeline.few_blocks_warnings(store, context, True)
  assert f"the heldout split of {tokens} holds only 19 blocks of {context} tokens" in line
  assert not pipeline.few_blocks_warnings(store, context, False)
  assert len(pipeline.few_blocks_warnings(store, store.num_tokens("train"), True)) == 2


@pytest.mark.parametrize("context", [30, 4])
def test_a_context_that_is_not_a_multiple_of_k_or_is_one_patch_is_refused(
  autoencoder_run, tmp_path, context
):
  run = changed(autoencoder_run, data={"context": context})
  refused(run, tmp_path / "new", f"multiple of K = 4 .* got {context}")


def test_a_context_longer_than_the_text_is_refused(autoencoder_run, tmp_path):
  run = changed(autoencoder_run, data={"context": 400_000})
  refused(run, tmp_path / "new", "prepare more text or shorten the context")


def test_an_empty_and_a_missing_store_are_refused(autoencoder_run, tmp_path):
  refused(
    changed(autoencoder_run, data={"path": ""}), tmp_path / "new", "config.data.path is empty"
  )
  missing_store = changed(autoencoder_run, data={"path": f"{tmp_path}/gone"})
  refused(missing_store, tmp_path / "new", "no such token store: .*gone")


def test_an_autoencoder_that_is_empty_missing_or_of_another_stage_is_refused(
  calm_run, trained_calm, tmp_path
):
  for path, reason in (
    ("", "config.autoencoder is empty"),
    (f"{tmp_path}/gone", "no workdir at"),
    (str(trained_calm), "holds a CALM language model, not an autoencoder"),
  ):
    refused(dataclasses.replace(calm_run, autoencoder=path), tmp_path / "new", reason)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_run_with_another_k_is_refused_with_both_values_and_the_flags(
  calm_run, tmp_path, dry_run
):
  run = changed(calm_run, model={"patch_size": 2})
  reason = (
    f"patch_size is 2, but the autoencoder in {calm_run.autoencoder} has K = 4 .* "
    "--config.model.patch_size=4 --config.data.context=64, which keeps the number of patches"
  )
  with pytest.raises(errors.CalmError, match=reason) as caught:
    train.train_run(run, str(tmp_path / "new"), train.Options(dry_run=dry_run))
  assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("case", "k"), [("k4", 4), ("k2_gqa", 2)])
def test_an_imported_model_has_the_k_of_its_autoencoder(case: str, k: int):
  imported = reading.read(folders.GOLDEN / case / "energy")
  assert imported.stage == "calm" and imported.sizes.patch_size == k


def test_a_run_can_not_start_from_weights_of_another_k(calm_run, trained_calm, tmp_path):
  run = dataclasses.replace(
    changed(calm_run, model={"patch_size": 2}), autoencoder="", start_from=str(trained_calm)
  )
  refused(run, tmp_path / "new", "give --config.model.patch_size=4")


def test_a_store_that_does_not_match_the_autoencoder_is_refused(
  calm_run, trained_autoencoder, other_tokens, tmp_path
):
  own = workdir.read_origin(str(trained_autoencoder)).tokenizer_hash
  other = store_lib.TokenStore.open(other_tokens).manifest.tokenizer.hash
  assert own != other
  refused(changed(calm_run, data={"path": other_tokens}), tmp_path / "new", f"{other}.*{own}")


def test_a_workdir_whose_config_differs_is_refused(autoencoder_run, trained_autoencoder):
  before = (trained_autoencoder / "config.json").read_text()
  run = changed(autoencoder_run, optimizer={"learning_rate": 0.5})
  with pytest.raises(errors.CalmError, match=r"optimizer.learning_rate: 0.003, 0.5"):
    train.train_run(run, str(trained_autoencoder))
  assert (trained_autoencoder / "config.json").read_text() == before


def test_another_model_is_refused_even_if_changes_are_allowed(
  autoencoder_run, trained_autoencoder, calm_run
):
  before = (trained_autoencoder / "config.json").read_text()
  for run, name in (
    (changed(autoencoder_run, model={"width": 32}), "model.width"),
    (calm_run, "stage"),
  ):
    with pytest.raises(
      errors.CalmError, match=rf"{name}: .*Give a new --workdir or the stored settings$"
    ):
      train.train_run(run, str(trained_autoencoder), train.Options(allow_config_change=True))
  assert (trained_autoencoder / "config.json").read_text() == before


def test_a_refused_run_leaves_no_autoencoder_for_the_next(calm_run, tmp_path):
  refused(changed(calm_run, head={"kind": "enrgy"}), tmp_path / "new", "did you mean 'energy'")
  refused(changed(calm_run, data={"context": 30}), tmp_path / "new", "multiple of K = 4")
  assert not (tmp_path / "new").exists()


def test_the_leftovers_of_an_interrupted_start_are_replaced(calm_run, trained_calm, tmp_path):
  """The workdir holds the weights of another autoencoder, but no config.json."""
  own, expected = (str(place / "autoencoder") for place in (tmp_path / "new", trained_calm))
  other = loading.load(expected)
  zeros = jax.tree.map(jnp.zeros_like, other.params)
  trained_lib.copy_parent(dataclasses.replace(other, params=zeros), "autoencoder", expected, own)
  train.train_run(changed(calm_run, training={"steps": 2}), str(tmp_path / "new"))
  copied = loading.load(own)
  jax.tree.map(np.testing.assert_array_equal, copied.params, other.params)
  assert (copied.run, copied.origin) == (other.run, other.origin)


def test_a_replacement_for_dropped_tokens_must_be_in_the_vocabulary(autoencoder_run, tmp_path):
  for id_ in (-1, 300):
    run = changed(autoencoder_run, loss={"drop_token_id": id_})
    refused(run, tmp_path / "new", rf"must lie in \[0, 300\), the vocabulary, got {id_}")


def test_a_tokenizer_with_an_unusual_eos_is_loaded_by_the_id(trained_calm, tmp_path):
  """The workdir records the id of an EOS that has no well-known name."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.add_special_tokens(["<pad>", "<fin>"])
  model.save(str(tmp_path / "tokenizer.json"))
  loaded = tokenizer_lib.load(str(tmp_path / "tokenizer.json"), eos="<fin>")
  origin = dataclasses.replace(
    workdir.read_origin(str(trained_calm)),
    tokenizer_file="tokenizer.json",
    tokenizer_hash=loaded.hash,
    eos_id=1,
  )
  assert workdir.tokenizer(str(tmp_path), origin).eos_id == 1


def test_other_data_for_a_started_run_is_refused(
  autoencoder_run, trained_autoencoder, other_tokens, tmp_path
):
  shutil.copytree(trained_autoencoder, tmp_path / "copy")
  run = changed(autoencoder_run, data={"path": other_tokens})
  with pytest.raises(errors.CalmError, match="was trained with tokenizer_hash"):
    train.train_run(run, str(tmp_path / "copy"), train.Options(allow_config_change=True))
  for name in ("config.json", "origin.json"):
    assert (tmp_path / "copy" / name).read_text() == (trained_autoencoder / name).read_text()


def test_a_workdir_without_a_checkpoint_is_refused(trained_autoencoder, calm_run, tmp_path):
  shutil.copytree(trained_autoencoder, tmp_path / "copy")
  shutil.rmtree(tmp_path / "copy/checkpoints")
  run = dataclasses.replace(calm_run, autoencoder=str(tmp_path / "copy"))
  refused(run, tmp_path / "new", "has no checkpoint yet: train it first")


def test_another_tokenizer_than_that_of_the_training_is_refused(
  trained_calm, other_tokens, tmp_path
):
  shutil.copytree(trained_calm, tmp_path / "copy")
  shutil.copy(f"{other_tokens}/tokenizer.model", tmp_path / "copy")
  origin = workdir.read_origin(str(tmp_path / "copy"))
  reason = f"but the model was trained with {origin.tokenizer_hash}"
  with pytest.raises(errors.CalmError, match=reason):
    workdir.tokenizer(str(tmp_path / "copy"), origin)


def test_a_broken_file_of_a_workdir_is_named(trained_calm, tmp_path):
  shutil.copytree(trained_calm, tmp_path / "copy")
  for name, content in (("config.json", "{"), ("origin.json", "{}")):
    (tmp_path / "copy" / name).write_text(content)
    with pytest.raises(errors.CalmError, match=name) as caught:
      loading.load(str(tmp_path / "copy"))
    assert "\n" not in str(caught.value)
    shutil.copy(trained_calm / name, tmp_path / "copy")


COMMANDS = {
  "no flags": ("main", "", "give --config=configs/STAGE.py"),
  "a config that never ends": (
    "main",
    "--config=/dev/zero --workdir={new}",
    "/dev/zero is a pipe, a device or a socket",
  ),
  "too many texts": (
    "generate",
    "--workdir={calm} --num_texts=2147483648",
    "in the range [1, 2147483647]",
  ),
  "too many draws": (
    "evaluate",
    "--workdir={calm} --temperatures=0.5 --num_candidates=2147483648",
    "[1, 65536]",
  ),
  "seconds that are not a number": (
    "report",
    "--workdir={calm},{autoencoder} --seconds_total=nan",
    "must be finite, got nan",
  ),
  "a context too long for XLA": (
    "evaluate",
    "--workdir={calm} --context=2147483648",
    "context is 2147483648 tokens, but",
  ),
  "too many slices": (
    "compile_ahead",
    "--config=configs/calm.py --slices=2147483648",
    "in the range [1, 4096]",
  ),
  "too many samples": (
    "evaluate",
    "--workdir={calm} --samples=2147483648",
    "samples must lie in [1, 65536]",
  ),
  "a mesh with odd digits": ("generate", "--workdir={calm} --mesh=fsdp=\u00b2", "--mesh has"),
  "no config file": ("main", "--config=configs/nothing.py --workdir={new}", "nothing.py"),
  "unknown size": ("main", "--config=configs/calm.py:xs --workdir={new}", "unknown size 'xs'"),
  "unknown setting": (
    "main",
    "--config=configs/calm.py --config.training.stepz=5 --workdir={new}",
    "steps",
  ),
  "wrong type": (
    "main",
    "--config=configs/calm.py --config.training.steps=many --workdir={new}",
    "many",
  ),
  "one sample": (
    "main",
    "--config=configs/calm.py --config.loss.samples=1 --workdir={new}",
    "config.loss.samples (N) must be at least 2 for the repulsion, got 1",
  ),
  "alpha": (
    "main",
    "--config=configs/calm.py --config.loss.alpha=2.5 --workdir={new}",
    "config.loss.alpha must lie in (0, 2], got 2.5",
  ),
  "indivisible batch": (
    "main",
    "--config=configs/calm.py --config.training.accumulation=3 --workdir={new}",
    "batch must be divisible by accumulation = 3, got 256",
  ),
  "stray argument": ("main", "training.steps=5", "unexpected argument 'training.steps=5'"),
  "no workdir to evaluate": ("evaluate", "--workdir={new}", "no workdir at"),
  "context to evaluate": ("evaluate", "--workdir={calm} --context=30", "multiple of K = 4"),
  "nothing held out to evaluate": (
    "evaluate",
    "--workdir={calm} --data={nothing_heldout}",
    "has no held-out split, as --heldout=0 asks: prepare the text with a share",
  ),
  "temperature": ("generate", "--workdir={calm} --temperature=1.2", "must lie in (0, 1]"),
  "rule": ("generate", "--workdir={calm} --rule=frist", "--rule"),
  "mesh of generation": ("generate", "--workdir={calm} --mesh=rows=2", "--mesh has 'rows=2'"),
  "prompts without output": ("generate", "--workdir={calm} --prompts=x", "go together"),
  "two kinds of prompts": (
    "generate",
    "--workdir={calm} --interactive --prompt=x",
    "can't be given together",
  ),
  "no sizes to count": ("cost", "", "give --config="),
  "draws above N": (
    "cost",
    "--config=configs/calm.py:m --temperature=0.5 --num_candidates=8 --draws=9",
    "got 9.0",
  ),
  "no model to time": ("benchmark", "--suite=decode", "give --workdir=DIR"),
  "temperatures of an autoencoder": (
    "evaluate",
    "--workdir={autoencoder} --temperatures=0.5",
    "generates no text",
  ),
  "a sampler without a choice": (
    "evaluate",
    "--workdir={calm} --temperatures=0.5 --samplers=first:error",
    "give RULE or RULE:AT_LIMIT",
  ),
  "a rule that can only fail": (
    "generate",
    "--workdir={calm} --rule=none --at_limit=error",
    "never settles",
  ),
  "a baseline that draws candidates": (
    "evaluate",
    "--workdir={calm} --temperatures=0.5 --baseline={calm}",
    "holds a CALM language model: give the workdir of a stage that samples exactly",
  ),
  "temperatures that are not numbers": (
    "evaluate",
    "--workdir={calm} --temperatures=a",
    "--temperatures is not a list of numbers",
  ),
  "text of an autoencoder": (
    "generate",
    "--workdir={autoencoder}",
    "holds an autoencoder, which generates no text",
  ),
  "report on nothing": ("report", "--workdir={new}", "no workdir at"),
  "no such input": (
    "prepare",
    "--input={new}/*.txt --output={new} --tokenizer=train:300",
    "matches nothing",
  ),
  "no blocks": ("evaluate", "--workdir={calm} --batch=0", "--batch=0"),
  "negative seed": ("generate", "--workdir={calm} --seed=-1", "--seed=-1"),
  "no format": ("convert", "--source={calm} --output={new}", "give --source=DIR, --output=DIR"),
  "unknown format": (
    "convert",
    "--source={calm} --output={new} --format=onxn",
    "--format is 'onxn': did you mean",
  ),
  "no folder to convert": (
    "convert",
    "--source={new} --output={new} --format=workdir",
    "not a folder with a config.json",
  ),
  "a tokenizer for an export": (
    "convert",
    "--source={calm} --output={new} --format=torch --tokenizer=x",
    "--tokenizer is only for --format=workdir",
  ),
  "no folder to write to": (
    "benchmark",
    "--suite=eval --output=no_folder/x.json",
    "there is no folder no_folder",
  ),
  "unknown contender": ("benchmark", "--suite=train --contenders=torch", "--contenders has"),
  "no document": ("benchmark", "--document=none.md", "can't read none.md"),
  "unknown suite": ("benchmark", "--suite=evil", "did you mean 'eval'"),
  "no such flag": ("generate", "--workdri={calm}", "--workdri: no such flag; nearest: --workdir"),
}


@pytest.fixture(scope="module")
def ended(
  trained_autoencoder, trained_calm, nothing_heldout, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[acts.Ended, pathlib.Path]]:
  """How each of COMMANDS ends, and the folder that it must not create."""
  places = {"calm": trained_calm, "autoencoder": trained_autoencoder}
  places["nothing_heldout"] = nothing_heldout
  new = {name: tmp_path_factory.mktemp("bad") / "new" for name in COMMANDS}
  lines: dict[str, list[list[str]]] = {}
  for name, (act, flags, _) in COMMANDS.items():
    lines.setdefault(act, []).append(flags.format(new=new[name], **places).split())
  answers = {act: iter(endings) for act, endings in acts.run(lines, str(ROOT)).items()}
  return {name: (next(answers[act]), new[name]) for name, (act, *_) in COMMANDS.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bad_command_ends_in_one_line(name: str, ended):
  (code, output, complaint), new = ended[name]
  assert code == 2 and output == ""
  last = complaint.splitlines()[-1]
  assert last.startswith("error: ") and COMMANDS[name][2] in last
  assert "Traceback" not in complaint and not new.exists()


def test_a_prompt_that_is_not_utf8_is_refused(trained_calm):
  command = [sys.executable, "-m", "calm_jax.generate", f"--workdir={trained_calm}", "--prompt=-"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, input=b"caf\xe9", timeout=120)
  assert done.returncode == 2 and b"error: the prompt is not UTF-8" in done.stderr


def test_a_reader_that_ends_early_ends_generation_quietly(trained_calm):
  command = f"{sys.executable} -m calm_jax.generate --workdir={trained_calm} | true"
  done = subprocess.run(
    ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 141 and "Traceback" not in done.stderr and "Error" not in done.stderr


def test_a_damaged_checkpoint_ends_in_one_line(trained_calm, tmp_path):
  shutil.copytree(trained_calm, tmp_path / "copy")
  for file in (tmp_path / "copy/checkpoints").rglob("params/d/*"):
    file.write_bytes(b"")
  command = [sys.executable, "-m", "calm_jax.generate", f"--workdir={tmp_path}/copy"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  *warnings, last = done.stderr.splitlines()
  assert done.returncode == 2 and last.startswith("error: none of the checkpoints")
  assert len(warnings) == 3 and all("can't be read" in line for line in warnings)
