"""Claims about adding a head: this file defines and registers one, and every part supports it.

Nothing in `calm_jax` knows its name.
"""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import config, errors
from calm_jax.generation import cost, requests
from calm_jax.models import calm, flops, layers
from calm_jax.models.heads import head, registry
from calm_jax.objectives import energy_score
from calm_jax.planning import writing
from calm_jax.reporting import page
from calm_jax.running import accounts, conversion, counting, loading, texts, train
from calm_jax.stages import autoencoder as autoencoder_stage
from calm_jax.stages import calm as calm_stage

ROOT = pathlib.Path(__file__).parent.parent
KIND = "gaussian"
SIZES = config.Autoencoder(width=16, ffn=32, latent=8, init="fan_in")
VOCAB = 24
PARENTS = {"autoencoder": autoencoder_stage.Run(model=SIZES)}


class Moments(nn.Module):
  """Hidden states -> mean and log std of the next latent: [..., D] -> [..., 2Z]."""

  latent: int

  @nn.compact
  def condition(self, hidden_D):
    return layers.linear("out", 2 * self.latent, "fan_in", jnp.float32)(hidden_D)


class GaussianHead(head.Head):
  """Samples of a diagonal normal distribution, trained by the energy score."""

  loss_unit = "latent unit of a toy"
  shaping = ("kind",)

  def __init__(self, sizes, trunk):
    self.network, self.width = Moments(trunk.latent), trunk.width
    self.noise_shape = (trunk.latent,)

  def init(self, key):
    return self.network.init(key, jnp.zeros((self.width,)), method="condition")["params"]

  def loss(self, params, hidden_PD, posterior, key, settings):
    sample_key, target_key = jax.random.split(key)
    sample_NPZ = self.sample(params, hidden_PD, sample_key, settings.samples)
    mean_PZ, log_std_PZ = posterior
    attraction_P = energy_score.drawn_attraction(
      target_key, sample_NPZ, mean_PZ, jnp.exp(log_std_PZ), settings.posterior_draws
    )
    return energy_score.energy_loss(sample_NPZ, attraction_P)[0], {"attraction": attraction_P}

  def draw_noise(self, key, shape):
    return jax.random.normal(key, (*shape, *self.noise_shape))

  def condition(self, params, hidden_D):
    return layers.apply(self.network, params, hidden_D, method="condition")

  def samples(self, params, condition, noise):
    mean_Z, log_std_Z = jnp.split(condition, 2, axis=-1)
    return mean_Z[None] + jnp.exp(log_std_Z)[None] * noise

  @classmethod
  def train_flops(cls, sizes, width, latent):
    return 2 * width * 2 * latent

  @classmethod
  def sampling_flops(cls, sizes, width, latent):
    return 2 * width * 2 * latent, 0


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(registry.HEADS, KIND, GaussianHead)


@pytest.fixture
def toy_run(calm_run: calm_stage.Run) -> calm_stage.Run:
  return dataclasses.replace(calm_run, head=config.Head(kind=KIND))


@pytest.fixture(scope="module")
def toy(
  calm_run: calm_stage.Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[calm_stage.Run, str]:
  """A finished run with the toy head, and its workdir."""
  run = dataclasses.replace(calm_run, head=config.Head(kind=KIND))
  directory = str(tmp_path_factory.mktemp("toy_head") / "run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(registry.HEADS, KIND, GaussianHead)
    train.train_run(run, directory)
  return run, directory


def lines(directory: str) -> list[dict]:
  text = pathlib.Path(directory, "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_nothing_in_the_package_knows_the_toy():
  files = [
    path.name
    for path in (ROOT / "calm_jax").rglob("*.py")
    if re.search(rf"\b{KIND}\b|{GaussianHead.__name__}", path.read_text())
  ]
  assert not files


def test_a_model_with_the_toy_head_has_a_loss_a_gradient_and_samples(toy_run: calm_stage.Run):
  model = calm.Calm.build(toy_run.model, toy_run.head, SIZES, VOCAB)
  params = model.initial(jax.random.key(0))
  hidden_PD = jax.random.normal(jax.random.key(1), (5, toy_run.model.width))
  posterior = jnp.ones((5, SIZES.latent)), jnp.zeros((5, SIZES.latent))

  def loss(params):
    loss_P, figures = model.head.loss(params, hidden_PD, posterior, jax.random.key(2), toy_run.loss)
    assert loss_P.shape == figures["attraction"].shape == (5,)
    return jnp.mean(loss_P)

  grads = jax.grad(loss)(params["head"])
  assert all(np.abs(grad).max() > 0 for grad in jax.tree.leaves(grads))
  sample_NPZ = model.sample(params, hidden_PD, jax.random.key(3), 2000)
  mean_PZ, log_std_PZ = np.split(model.head.condition(params["head"], hidden_PD), 2, axis=-1)
  deviation_PZ = (np.mean(sample_NPZ, axis=0) - mean_PZ) / np.exp(log_std_PZ)
  assert np.abs(deviation_PZ).max() < 5 / np.sqrt(2000)


def test_its_flops_are_counted(toy_run: calm_stage.Run):
  """By hand: one product of the hidden state with a matrix of 16 by 2 times 8."""
  product, size = 2 * 16 * 16, SIZES.patch_size
  parts = counting.train_parts(toy_run, PARENTS, VOCAB)
  assert parts["head"] == 3 * toy_run.loss.samples * product / size
  job = cost.WritingJob(toy_run, PARENTS, VOCAB, positions=8, draws=5)
  parts = {part.name: part.flops for part in writing.parts(job)}
  assert (parts["head, once"], parts["head, draws"]) == (product / size, 0)
  with pytest.raises(errors.CalmError, match="counted for the energy head only, not for 'gaus"):
    counting.program_per_token(toy_run, PARENTS, VOCAB)


def test_it_trains_is_evaluated_and_a_finished_run_resumes(toy: tuple[calm_stage.Run, str]):
  run, directory = toy
  reports = [line for line in lines(directory) if line["kind"] == "train"]
  assert reports[-1]["step"] == run.training.steps and np.isfinite(reports[-1]["loss"])
  assert reports[-1]["loss"] < reports[0]["loss"] and reports[-1]["attraction"] > 0
  scores = [line for line in lines(directory) if line["kind"] == "evaluation"]
  assert scores and all(np.isfinite(line["energy"]) for line in scores)
  train.train_run(run, directory)
  assert loading.load(directory).step == run.training.steps


def test_it_generates_text_and_is_reported(toy: tuple[calm_stage.Run, str], tmp_path: pathlib.Path):
  _, directory = toy
  trained = loading.load(directory)
  decoder = texts.decoder(trained, requests.Sampler(), lambda line: None)
  text = decoder.start([requests.Request((), max_tokens=8)])
  assert len(text.advance(2)[0].tokens) == 8
  report = pathlib.Path(page.write([accounts.read(directory)], str(tmp_path))).read_text()
  assert "Training loss" in report and KIND in report


def test_weights_start_a_run_unless_a_setting_that_shapes_them_differs(
  toy: tuple[calm_stage.Run, str], tmp_path: pathlib.Path
):
  """The toy has no blocks, so their number changes no shape."""
  run, directory = toy
  run = dataclasses.replace(run, autoencoder="", start_from=directory)
  dry = train.Options(dry_run=True)
  blocks = dataclasses.replace(run, head=config.Head(kind=KIND, blocks=3))
  train.train_run(blocks, str(tmp_path / "new"), dry)
  with pytest.raises(errors.CalmError, match=f"give --config.head.kind={KIND}"):
    train.train_run(dataclasses.replace(run, head=config.Head()), str(tmp_path / "new"), dry)


def test_a_format_that_does_not_support_it_refuses_it(
  toy: tuple[calm_stage.Run, str], tmp_path: pathlib.Path
):
  _, directory = toy
  with pytest.raises(errors.CalmError, match=rf"'{KIND}' heads have no tensors in the reference"):
    conversion.convert(directory, str(tmp_path / "out"), "reference")
  conversion.convert(directory, str(tmp_path / "out"), "stablehlo")
  assert GaussianHead.noise_law in (tmp_path / "out/README.md").read_text()


def test_an_unknown_head_is_refused_by_a_dry_run_in_one_line(
  calm_run: calm_stage.Run, tmp_path: pathlib.Path
):
  run = dataclasses.replace(calm_run, head=config.Head(kind="gausian"))
  with pytest.raises(errors.CalmError) as refused:
    train.train_run(run, str(tmp_path / "run"), train.Options(dry_run=True))
  assert str(refused.value) == (
    "head.kind is 'gausian': did you mean 'gaussian'? known: diffusion, energy, flow, gaussian"
  )


def test_an_unknown_head_is_refused_where_costs_are_counted(toy_run: calm_stage.Run):
  run = dataclasses.replace(toy_run, head=config.Head(kind="unheard of"))
  with pytest.raises(errors.CalmError, match=r"head\.kind is 'unheard of'"):
    counting.train_per_token(run, PARENTS, VOCAB)
  with pytest.raises(errors.CalmError, match=r"head\.kind is 'unheard of'"):
    flops.head_parts(run.head, 16, 8)


def test_too_few_steps_for_a_head_are_refused():
  with pytest.raises(errors.CalmError, match=r"config.head.steps must be 0 or lie in \[2, 1000\]"):
    registry.lookup(config.Head(kind="diffusion", steps=1))
  assert registry.lookup(config.Head(kind="flow", steps=1)) is registry.HEADS["flow"]
