"""Claims about adding a stage: this file defines and registers one, and every part supports it.

Nothing in `calm_jax` knows its name. Given the current token, it learns to predict the next token
that its parent, a baseline, generates. Its targets are rollouts, which its own source generates.
This file is also its config file, and a command that runs an act with the stage registered:

  python tests/test_toy_stage.py main --config=tests/test_toy_stage.py --workdir=W
"""

import dataclasses
import importlib
import json
import pathlib
import re
import subprocess
import sys
import time
from typing import Any, Literal

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import cli, config, errors, resolve, workdir, workdir_checks
from calm_jax.data import pipeline
from calm_jax.figures import LOWER, Figure
from calm_jax.generation import requests
from calm_jax.models import layers
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.reporting import page, presentation
from calm_jax.running import (
  accounts,
  conversion,
  counting,
  evaluating,
  loading,
  starting,
  texts,
  train,
  untrained,
)
from calm_jax.stages import spec as spec_lib
from calm_jax.stages import table
from calm_jax.training import evaluation, program, stage

ROOT = pathlib.Path(__file__).parent.parent
NAME = "parrot"
PROMPT = 8  # Tokens of a block that the parent reads before it generates one.


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of the toy.

  Attributes:
    width: of the embedding.
  """

  width: int = 8


@dataclasses.dataclass(frozen=True)
class Run(config.Run):
  """A toy: the current token -> the next token, as the parent generates it.

  Attributes:
    teacher: the parent's workdir.
  """

  stage: Literal["parrot"] = "parrot"
  teacher: str = ""
  model: Sizes = dataclasses.field(default_factory=Sizes)


class Bigram(nn.Module):
  """Logits of the next token, given the current one: [...] -> [..., V]."""

  width: int
  vocab_size: int

  @nn.compact
  def __call__(self, token):
    x_D = nn.Embed(self.vocab_size, self.width, name="embed")(token)
    return nn.Dense(self.vocab_size, use_bias=False, name="out")(x_D)

  def mapped(self, function):
    return function(self)

  def initial(self, key):
    return self.init(key, jnp.zeros((1,), jnp.int32))["params"]


def fields(run: Run) -> dict[str, pipeline.Field]:
  target = pipeline.Field((), np.dtype(np.int32))
  return {**pipeline.fields(run.data.context), "target": target}


class Rollouts:
  """Blocks of the store, each with the token that the parent generates after its first tokens."""

  def __init__(self, run: Run, store, parents, rows: np.ndarray):
    settings = run.training
    self._blocks = pipeline.TrainingBatches(
      store, run.data.context, settings.batch, settings.seed, rows
    )
    self._decoder = texts.decoder(parents["teacher"], requests.Sampler(), lambda line: None)
    self._eos_id = store.manifest.tokenizer.eos_id
    self.get_state, self.set_state = self._blocks.get_state, self._blocks.set_state

  def __next__(self):
    batch = next(self._blocks)
    prompts = [
      requests.Request(tuple(tokens[:PROMPT].tolist()), max_tokens=1, number=int(index))
      for tokens, index in zip(batch["tokens"], batch["index"], strict=True)
    ]
    written = self._decoder.start(prompts).advance(1)
    # A text that ends at once has no tokens: EOS is not among them.
    target = [text.tokens[0] if text.tokens else self._eos_id for text in written]
    return {**batch, "target": np.array(target, np.int32)}


def _stage(run: Run, model: Bigram, parents) -> stage.Stage:
  def cross_entropy(params, token, target):
    log_p = jax.nn.log_softmax(layers.apply(model, params, token))
    return -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]

  def loss(params, frozen, batch, key):
    value = jnp.mean(cross_entropy(params, batch["tokens"][:, PROMPT - 1], batch["target"]))
    metrics = {"tokens": jnp.float32(len(batch["target"])), "patches_per_token": jnp.float32(1)}
    return value, metrics | {"surprise": value}

  def evaluate(params, frozen, batch, key):
    token_BS = batch["tokens"]
    nats_BS = cross_entropy(params, token_BS[:, :-1], token_BS[:, 1:])
    return {"surprise": jnp.mean(nats_BS, axis=1)}

  return stage.Stage(
    model.initial, loss, evaluate, lambda scores: stage.with_stderr(scores, "surprise")
  )


def _pictures():
  from calm_jax.reporting import training_pictures

  return training_pictures.PICTURES


SURPRISE = Figure("surprise", "Surprise", "nats a token", LOWER, console="value")
SPEC = spec_lib.Spec(
  run=Run,
  title="a parrot",
  parents={"teacher": "transformer"},
  patch_size=lambda run: 1,
  model=lambda run, parents, vocab_size, dtype: Bigram(run.model.width, vocab_size),
  stage=_stage,
  source=Rollouts,
  fields=fields,
  flops=lambda run, parents, vocab_size: {"output": 3 * 2 * run.model.width * vocab_size},
  program_flops=lambda run, parents, vocab_size: 3 * 2 * run.model.width * vocab_size,
  presentation=presentation.Presentation(
    heading="A parrot",
    title="Parrot",
    settings=("model.width",),
    metrics=lambda run: (SURPRISE,),
    figures=(SURPRISE,),
    loss_unit=lambda run: "nats a token",
    pictures=_pictures,
    summary={"parrot_surprise": "surprise"},
  ),
)


def get_config():
  return resolve.to_config_dict(
    Run(
      data=config.Data(context=32),
      optimizer=config.Optimizer(learning_rate=3e-2, warmup_steps=2),
      training=config.Training(
        steps=60,
        batch=4,
        compute_dtype="float32",
        log_every=5,
        eval_every=30,
        eval_blocks=4,
        checkpoint_every=10,
      ),
      mesh=config.Mesh(fsdp=1),
    )
  )


if __name__ == "__main__":
  table.STAGES[NAME] = SPEC
  act = importlib.import_module(f"calm_jax.{sys.argv.pop(1)}")
  cli.run(act.main)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(table.STAGES, NAME, SPEC)


@pytest.fixture(scope="module")
def flags(tokens: str, trained_transformer: pathlib.Path) -> list[str]:
  return [
    f"--config={__file__}",
    f"--config.data.path={tokens}",
    f"--config.teacher={trained_transformer}",
  ]


def command(act: str, *words: str) -> list[str]:
  return [sys.executable, __file__, act, *words]


def run_and_kill(words: list[str], checkpoint: pathlib.Path) -> None:
  """Runs the training command, and kills it when a checkpoint exists."""
  process = subprocess.Popen(command("main", *words), cwd=ROOT, stderr=subprocess.DEVNULL)
  while not checkpoint.exists():
    assert process.poll() is None, "the run ended before its first checkpoint"
    time.sleep(0.02)
  process.kill()
  assert process.wait() < 0


@pytest.fixture(scope="module")
def trained(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The workdir of a run that was killed in the middle and then resumed to its end."""
  directory = tmp_path_factory.mktemp("toy_stage") / "run"
  words = [*flags, f"--workdir={directory}"]
  run_and_kill(words, directory / "checkpoints/10")
  subprocess.run(command("main", *words), cwd=ROOT, check=True, capture_output=True)
  return directory


def run_of(directory: pathlib.Path) -> Run:
  return loading.read_run(str(directory))


def reports(directory: pathlib.Path, kind: str) -> list[dict[str, Any]]:
  lines = map(json.loads, (directory / workdir.METRICS).read_text().splitlines())
  return [line for line in lines if line["kind"] == kind]


def test_nothing_in_the_package_knows_the_toy():
  sources = [*(ROOT / "calm_jax").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
  assert not [path for path in sources if re.search(NAME, path.read_text(), re.IGNORECASE)]


def test_a_killed_run_resumes_and_equals_an_uninterrupted_one(
  trained: pathlib.Path, tmp_path: pathlib.Path
):
  """Both end with bit-identical weights, although the targets are rollouts."""
  steps = [line["step"] for line in reports(trained, "train")]
  assert steps == list(range(5, 65, 5))
  train.train_run(run_of(trained), str(tmp_path / "whole"))
  a, b = (loading.load(str(place)) for place in (trained, tmp_path / "whole"))
  assert (a.step, a.fingerprint) == (60, b.fingerprint)
  losses, whole = (
    [line["surprise"] for line in reports(place, "train")]
    for place in (trained, tmp_path / "whole")
  )
  assert losses == whole and len(set(losses)) == len(steps)


def test_its_parent_is_copied_bound_and_verified(
  trained: pathlib.Path, trained_transformer: pathlib.Path
):
  loaded = loading.load(str(trained), NAME)
  teacher = loading.load(str(trained_transformer))
  assert loaded.parents["teacher"].fingerprint == teacher.fingerprint
  assert loaded.origin.parents == {"teacher": teacher.fingerprint}
  checked = {name: check() for name, check in workdir_checks.checks(str(trained))}
  assert "weights" in checked["teacher"] and "teacher/checkpoints/6" in checked


def test_a_run_without_its_parent_is_refused_in_one_line(trained: pathlib.Path, tmp_path):
  run = dataclasses.replace(run_of(trained), teacher="")
  dry = train.Options(dry_run=True)
  with pytest.raises(errors.CalmError, match=r"give --config\.teacher=W, the workdir of a Tr"):
    train.train_run(run, str(tmp_path / "new"), dry)
  with pytest.raises(errors.CalmError, match="holds a parrot, not a Transformer baseline"):
    train.train_run(dataclasses.replace(run, teacher=str(trained)), str(tmp_path / "new"), dry)


def test_a_dry_run_compiles_its_step_and_writes_nothing(
  trained: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
):
  train.train_run(run_of(trained), str(tmp_path / "new"), train.Options(dry_run=True))
  output = capfd.readouterr().err
  assert "attention none" in output and "dry run: nothing" in output
  assert not (tmp_path / "new").exists()


def test_it_is_evaluated_and_reported(
  trained: pathlib.Path, tokens: str, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
):
  done = subprocess.run(
    command("evaluate", f"--workdir={trained}"), cwd=ROOT, capture_output=True, check=True
  )
  figures = json.loads(done.stdout)
  assert (figures["stage"], figures["step"]) == (NAME, 60)
  loaded = loading.load(str(trained))
  functions, _ = evaluating.functions(loaded)
  store = starting.synthetic.open_store(tokens)
  scores = evaluation.Evaluator(functions, store, 32, 4, 0, 0)(loaded.params)
  assert scores and figures["surprise"] == pytest.approx(scores["surprise"], rel=1e-5)
  account = accounts.read(str(trained))
  text = pathlib.Path(page.write([account], str(tmp_path))).read_text()
  assert "A parrot" in text and "Surprise" in text and "Training loss" in text


def test_it_is_counted_and_planned_without_a_workdir():
  run = Run(**{name: getattr(untrained_run(), name) for name in ("data", "training")})
  parents = untrained.parent_runs(run, {})
  assert counting.train_parts(run, parents, 100) == {"output": 3 * 2 * 8 * 100}
  model = untrained.trained(run, parents, 100, untrained.abstract)
  assert model.params["embed"]["embedding"].shape == (100, 8)
  assert starting.next_command(run, "W", "m") == "next: python -m calm_jax.evaluate --workdir=W"


def test_its_step_is_compiled_without_a_workdir():
  run = untrained_run()
  functions = untrained.functions(run, {}, 100, untrained.abstract)
  mesh = mesh_lib.build(run.mesh, jax.devices()[:1])
  with jax.set_mesh(mesh):
    step = program.TrainProgram(run, functions, mesh, SPEC.fields(run)).lowered_step()
  batch = {name: x.shape for name, x in step.in_avals[0][2].items()}
  assert batch == {"tokens": (4, 32), "index": (4,), "target": (4,)}


def untrained_run() -> Run:
  return table.run_from(get_config().to_dict())


def test_unsupported_requests_are_refused_in_one_line(
  trained: pathlib.Path, tmp_path: pathlib.Path
):
  with pytest.raises(
    errors.CalmError, match="--format=torch is for autoencoder and calm and tempered, but "
  ):
    conversion.convert(str(trained), str(tmp_path / "out"), "torch")
  with pytest.raises(errors.CalmError, match="a parrot, which generates no text"):
    texts.decoder(loading.load(str(trained)), requests.Sampler(), print)
