"""Claims about what a run says: at its start what may not be meant, at its end what comes next."""

import dataclasses
import re
import shlex

import pytest

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


def test_a_run_inside_its_warmup_and_one_over_the_data_again_are_remarked(autoencoder_run, tokens):
  store = store_lib.TokenStore.open(tokens)
  blocks = store.num_tokens("train") // 32
  warm = changed(autoencoder_run, optimizer={"warmup_steps": 6})
  assert starting.remarks(warm, store) == []
  assert starting.remarks(changed(warm, training={"steps": 3}), store) == [
    "training.steps = 3 ends inside the warmup, optimizer.warmup_steps = 6: the learning rate "
    "reaches 50.0% of its peak"
  ]
  once = changed(warm, training={"steps": blocks, "batch": 1})
  assert starting.remarks(once, store) == []
  twice = changed(warm, training={"steps": blocks, "batch": 2})
  assert starting.remarks(twice, store) == [
    f"{blocks:,} steps of 2 examples are 2.00 epochs: the data holds {blocks:,} examples of 32 "
    "tokens"
  ]
  assert starting.remarks(changed(twice, data={"reuse_batch": True}), store) == []


def test_a_run_begins_with_remarks_and_ends_with_where_it_is_saved(
  autoencoder_run, tmp_path, capsys: pytest.CaptureFixture[str]
):
  training = {"steps": 2, "eval_every": 0, "log_every": 2}
  run = changed(autoencoder_run, optimizer={"warmup_steps": 60}, training=training)
  train.train_run(run, str(tmp_path / "run"))
  said = capsys.readouterr().err.splitlines()
  kinds = [line.partition(" =")[0].partition("/")[0] for line in said]
  assert kinds.index("training.steps") < kinds.index("train 2") < len(said) - 1
  assert said[-1] == f"saved step 2 in {tmp_path}/run"
  train.train_run(run, str(tmp_path / "run"))
  again = capsys.readouterr().err.splitlines()
  assert again[-2:] == ["resuming after step 2", f"saved step 2 in {tmp_path}/run"]


def test_after_an_autoencoder_comes_the_language_model_of_its_k():
  run = autoencoder_stage.Run(data=config.Data("some data"))
  told = starting.next_command(run, "runs/my ae", "quickstart")
  begin, *words = shlex.split(told.removeprefix("next: "))
  assert (begin, words) == ("python", [
    "-m", "calm_jax.main", "--config=calm.py:quickstart", "--config.data.path=some data",
    "--config.autoencoder=runs/my ae", "--workdir=DIR",
  ])  # fmt: skip
  long = dataclasses.replace(run, model=config.Autoencoder(patch_size=8))
  flags = "--config.model.patch_size=8 --workdir=DIR"
  assert starting.next_command(long, "ae", "m").endswith(flags)


@pytest.mark.parametrize("run", [calm_stage.Run(), transformer_stage.Run()])
def test_after_a_language_model_come_its_scores_and_its_text(run):
  commands = re.findall(r"python -m calm_jax\.(.*)", starting.next_command(run, "runs/lm", "m"))
  assert commands == ["evaluate --workdir=runs/lm", "generate --workdir=runs/lm --prompt=TEXT"]
