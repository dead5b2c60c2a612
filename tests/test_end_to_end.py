"""The complete pipeline at toy size, by its commands; and Ctrl-C."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TRAINING = (
  "--config.data.context=32", "--config.training.batch=8", "--config.training.steps=6",
  "--config.training.eval_every=3", "--config.training.checkpoint_every=3",
  "--config.optimizer.warmup_steps=2",
)  # fmt: skip
AUTOENCODER = ("--config.model.width=16", "--config.model.ffn=32", "--config.model.latent=8")
TRANSFORMER = (
  "--config.model.layers=1", "--config.model.width=16", "--config.model.ffn=32",
  "--config.model.heads=2", "--config.model.kv_heads=1",
)  # fmt: skip
CALM = (*TRANSFORMER, "--config.head.blocks=1")


def act(name: str, *flags: str, code: int = 0) -> subprocess.CompletedProcess[str]:
  """Runs a command in the repository's root and requires its exit code."""
  command = [sys.executable, "-m", f"calm_jax.{name}", *flags]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
  assert done.returncode == code, done.stderr
  assert "Traceback" not in done.stderr
  return done


@pytest.fixture(scope="module")
def folder(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Workdirs of both stages and the baseline, trained by their commands."""
  root = tmp_path_factory.mktemp("story")
  data = f"--config.data.path={tokens}"
  act(
    "main", "--config=configs/autoencoder.py:quickstart", data, *TRAINING, *AUTOENCODER,
    f"--workdir={root}/autoencoder",
  )  # fmt: skip
  act(
    "main", "--config=configs/calm.py:quickstart", data, *TRAINING, *CALM,
    f"--config.autoencoder={root}/autoencoder", f"--workdir={root}/calm",
  )  # fmt: skip
  act(
    "main", "--config=configs/transformer.py:quickstart", data, *TRAINING, *TRANSFORMER,
    f"--workdir={root}/transformer",
  )  # fmt: skip
  return root


def test_a_workdir_holds_config_metrics_and_checkpoints(folder: pathlib.Path):
  for stage in ("autoencoder", "calm"):
    config = json.loads((folder / stage / "config.json").read_text())
    assert (config["stage"], config["training"]["steps"]) == (stage, 6)
    records = (folder / stage / "metrics.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in records]
    assert kinds.count("evaluation") == 2 and "train" in kinds
    assert {p.name for p in (folder / stage / "checkpoints").iterdir()} == {"3", "6"}


def test_evaluation_text_and_report(folder: pathlib.Path):
  for stage in ("autoencoder", "calm"):
    printed = act("evaluate", f"--workdir={folder}/{stage}", "--blocks=3").stdout
    assert printed == (folder / stage / "evaluation.json").read_text()
    assert json.loads(printed)["context_tokens"] == 32
  figures = json.loads(printed)
  assert figures["samples"] == 8 and figures["tokens"] == 96
  assert {"brier_lm", "brier_lm_marginal", "conditioning_gap_stderr"} <= figures.keys()

  flags = (f"--workdir={folder}/calm", "--prompt=The cats", "--max_tokens=9", "--temperature=0.5")
  texts = [act("generate", *flags, f"--seed={seed}").stdout for seed in (1, 1, 2)]
  assert texts[0] == texts[1] != texts[2] and texts[0].startswith("The cats")

  workdirs = f"--workdir={folder}/autoencoder,{folder}/calm"
  shown = act("report", workdirs, f"--output={folder}", "--seconds_total=12").stdout
  summary = json.loads((folder / "summary.json").read_text())
  assert summary["seconds_total"] == 12 and len(summary["text_samples"]) == 3
  assert "ae_token_accuracy" in shown
  assert (folder / "report.html").read_text().count("<img") > 10


def test_the_baseline_is_evaluated_generates_and_is_reported(folder: pathlib.Path):
  directory = f"--workdir={folder}/transformer"
  figures = json.loads(act("evaluate", directory, "--blocks=3").stdout)
  assert {"brier_lm", "brier_lm_marginal", "cross_entropy", "cross_entropy_stderr"} <= set(figures)
  flags = (directory, "--prompt=The cats", "--max_tokens=9", "--temperature=0.5")
  texts = [act("generate", *flags, f"--seed={seed}").stdout for seed in (1, 1, 2)]
  assert texts[0] == texts[1] != texts[2] and texts[0].startswith("The cats")
  act("report", directory)
  page = (folder / "transformer/report.html").read_text()
  assert "Baseline: Transformer" in page and "Cross-entropy" in page


def test_exported_weights_are_imported_evaluated_and_trained_further(
  folder: pathlib.Path, tokens: str
):
  def convert(source: str, output: str, kind: str) -> str:
    flags = (f"--source={folder}/{source}", f"--output={folder}/{output}", f"--format={kind}")
    return act("convert", *flags).stdout

  assert convert("calm", "out", "reference") == f"wrote {folder}/out\n"
  convert("out", "back", "workdir")
  (folder / "back/evaluation.json").unlink(missing_ok=True)
  printed = act("evaluate", f"--workdir={folder}/back", f"--data={tokens}", "--context=32").stdout
  original = act("evaluate", f"--workdir={folder}/calm", "--seed=0").stdout
  names = ("brier_1", "accuracy_1", "collision_1", "tokens")
  assert [json.loads(printed)[name] for name in names] == [
    json.loads(original)[name] for name in names
  ]
  act("generate", f"--workdir={folder}/back", "--prompt=The cats of number", "--max_tokens=4")
  act(
    "main", "--config=configs/calm.py:quickstart", f"--config.data.path={tokens}", *TRAINING,
    *CALM, f"--config.start_from={folder}/back", f"--workdir={folder}/further",
  )  # fmt: skip
  assert (folder / "further/autoencoder/checkpoints").exists()


def test_ctrl_c_saves_and_the_same_command_resumes(folder: pathlib.Path, tokens: str):
  flags = (
    "--config=configs/autoencoder.py:quickstart", f"--config.data.path={tokens}", *TRAINING,
    *AUTOENCODER, "--config.training.steps=100000", "--config.training.log_every=1",
    "--config.training.eval_every=0", f"--workdir={folder}/stopped",
  )  # fmt: skip
  process = subprocess.Popen(
    [sys.executable, "-m", "calm_jax.main", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True,
    env=os.environ | {"PYTHONUNBUFFERED": "1"},
  )  # fmt: skip
  with process, process.stderr or open(os.devnull) as lines:
    for line in lines:
      if line.startswith("train 3/"):
        process.send_signal(signal.SIGINT)
        break
    rest = lines.read()
  assert process.returncode == 130 and "Traceback" not in rest
  step = int(rest.split("saved step ")[1].split(";")[0])
  assert (folder / f"stopped/checkpoints/{step}").exists()
  last = step + 2
  more = [f"--config.training.steps={last}", "--allow_config_change"]
  assert f"resuming after step {step}" in act("main", *flags, *more).stderr
