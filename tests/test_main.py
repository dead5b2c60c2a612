"""Claims about what main prints: remarks on unusual settings first, the next command last."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys

import pytest
from processes import ROOT

from calm_jax import config
from calm_jax.data import store as store_lib
from calm_jax.running import starting, train
from calm_jax.stages import autoencoder as autoencoder_stage
from calm_jax.stages import calm as calm_stage
from calm_jax.stages import transformer as transformer_stage


def changed(run: config.Run, **parts) -> config.Run:
  return dataclasses.replace(
    run, **{part: dataclasses.replace(getattr(run, part), **new) for part, new in parts.items()}
  )


def test_a_run_shorter_than_its_warmup_or_longer_than_an_epoch_is_remarked_on(
  autoencoder_run, tokens
):
  store = store_lib.TokenStore.open(tokens)
  blocks = store.num_tokens("train") // 32
  warm = changed(autoencoder_run, optimizer={"warmup_steps": 6})
  assert starting.remarks(warm, store) == []
  assert starting.remarks(changed(warm, training={"steps": 3}), store) == [
    "training.steps = 3 ends inside the warmup, optimizer.warmup_steps = 6: the learning rate "
    "reaches 50.0% of its peak"
  ]
  one_epoch = changed(warm, training={"steps": blocks, "batch": 1})
  assert starting.remarks(one_epoch, store) == []
  two_epochs = changed(warm, training={"steps": blocks, "batch": 2})
  assert starting.remarks(two_epochs, store) == [
    f"{blocks:,} steps of 2 examples are 2.00 epochs: the data holds {blocks:,} examples of 32 "
    "tokens"
  ]
  assert starting.remarks(changed(two_epochs, data={"reuse_batch": True}), store) == []


def test_a_run_prints_remarks_first_and_the_saved_step_last(
  autoencoder_run, tmp_path, capsys: pytest.CaptureFixture[str]
):
  training = {"steps": 2, "eval_every": 0, "log_every": 2}
  run = changed(autoencoder_run, optimizer={"warmup_steps": 60}, training=training)
  train.train_run(run, str(tmp_path / "run"))
  output = capsys.readouterr().err.splitlines()
  kinds = [line.partition(" =")[0].partition("/")[0] for line in output]
  assert kinds.index("training.steps") < kinds.index("train 2") < len(output) - 1
  assert output[-1] == f"saved step 2 in {tmp_path}/run"
  train.train_run(run, str(tmp_path / "run"))
  resumed_output = capsys.readouterr().err.splitlines()
  assert resumed_output[-2:] == ["resuming after step 2", f"saved step 2 in {tmp_path}/run"]


def test_a_refused_run_leaves_no_workdir_and_an_accepted_one_keeps_what_it_compiles(
  trained_autoencoder, tokens, tmp_path
):
  environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}

  def ended(*flags: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "calm_jax.main", "--config=configs/calm.py:quickstart"]
    sizes = ("layers=1", "width=16", "ffn=32", "heads=2", "kv_heads=2")
    settings = [f"--config.model.{size}" for size in sizes] + [f"--config.data.path={tokens}"]
    settings += [f"--config.autoencoder={trained_autoencoder}", "--config.data.context=32"]
    settings += ["--config.training.steps=2", "--config.training.eval_every=0"]
    words = [*command, *settings, f"--workdir={tmp_path}/run", *flags]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr

  # Its autoencoder has been read and its model built by then.
  code, output = ended("--config.loss.token_weight=1", "--config.loss.token_every=3")
  assert code == 2 and "token_every must divide the 8 patches" in output, output
  assert not list(tmp_path.iterdir())
  code, output = ended()
  assert code == 0, output
  assert [path for path in (tmp_path / "run" / train.COMPILED).iterdir() if path.is_file()]


def test_after_an_autoencoder_the_next_command_trains_a_language_model_of_its_k():
  run = autoencoder_stage.Run(data=config.Data("some data"))
  command = starting.next_command(run, "runs/my ae", "quickstart")
  begin, *words = shlex.split(command.removeprefix("next: "))
  assert (begin, words) == ("python", [
    "-m", "calm_jax.main", "--config=calm.py:quickstart", "--config.data.path=some data",
    "--config.autoencoder=runs/my ae", "--workdir=DIR",
  ])  # fmt: skip
  large_patches = dataclasses.replace(run, model=config.Autoencoder(patch_size=8))
  flags = "--config.model.patch_size=8 --workdir=DIR"
  assert starting.next_command(large_patches, "ae", "m").endswith(flags)


@pytest.mark.parametrize("run", [calm_stage.Run(), transformer_stage.Run()])
def test_after_a_language_model_the_next_commands_evaluate_and_generate(run):
  commands = re.findall(r"python -m calm_jax\.(.*)", starting.next_command(run, "runs/lm", "m"))
  assert commands == ["evaluate --workdir=runs/lm", "generate --workdir=runs/lm --prompt=TEXT"]
