"""Claims about the published sizes and ablations: parameter counts, and a config for each row."""

import dataclasses
import pathlib
import re

import jax
import pytest

from calm_jax import config, resolve
from calm_jax.models import autoencoder, calm, transformer
from calm_jax.running import counting, untrained
from calm_jax.stages import table
from configs import ablations
from configs import autoencoder as autoencoder_config
from configs import calm as calm_config
from configs import transformer as transformer_config

ROOT = pathlib.Path(__file__).parent.parent
LLAMA3 = 128_256


def count(init) -> int:
  return sum(x.size for x in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))


@pytest.mark.parametrize(("size", "millions"), [("m", 371.7), ("l", 735.3), ("xl", 1829.8)])
@pytest.mark.parametrize("vocab", [LLAMA3, LLAMA3 + 1])
def test_calm_has_the_published_number_of_parameters(size: str, millions: float, vocab: int):
  run = calm_config.SIZES[size]
  model = calm.Calm.build(run.model, run.head, config.Autoencoder(), vocab)
  assert round(count(model.initial) / 1e6, 1) == millions


def test_calm_m_by_hand():
  """The sum of CALM-M's matrices is exact."""
  width, ffn, layers, k, latent, noise, blocks = 1024, 2752, 16, 4, 128, 64, 4
  layer = 4 * width**2 + 3 * width * ffn + 2 * width
  entry = k * width * 2 * width + 2 * width + 2 * width * width + width + 2 * width
  block = 2 * width + (2 * width * width + width) + (width * width + width)
  block += (width * 2 * width + 2 * width) + (width * width + width)
  head = noise * width + width + 2 * width + width * width + width + 2 * width + blocks * block
  head += 2 * width + width * width + width + width * latent + latent
  expected = LLAMA3 * width + entry + layers * layer + width + head
  run = calm_config.M
  model = calm.Calm.build(run.model, run.head, config.Autoencoder(), LLAMA3)
  assert count(model.initial) == expected


@pytest.mark.parametrize(("size", "millions"), [("s", 282.0), ("m", 465.1), ("l", 847.0)])
def test_the_baseline_has_the_published_number_of_parameters(size: str, millions: float):
  run = transformer_config.SIZES[size]
  assert round(count(transformer.Transformer(run.model, LLAMA3).initial) / 1e6, 1) == millions


def test_the_autoencoder_has_the_published_number_of_parameters():
  module = autoencoder.Autoencoder(autoencoder_config.PAPER.model, LLAMA3)
  assert round(count(module.initial) / 1e6, 1) == 75.8


PUBLISHED_STEP = 2**21  # Tokens: "2M".


@pytest.mark.parametrize(
  "run",
  [
    *(calm_config.SIZES[size] for size in ("m", "l", "xl")),
    *(ablations.ROWS[f"k_{k}"] for k in (1, 2, 4, 8)),
    *(transformer_config.SIZES[size] for size in ("s", "m", "l")),
  ],
)
def test_the_published_recipe(run: config.Run):
  optimizer = run.optimizer
  assert run.training.batch * run.data.context == PUBLISHED_STEP
  assert (run.training.steps, optimizer.warmup_steps) == (250_000, 2000)
  assert (optimizer.learning_rate, optimizer.schedule) == (3e-4, "constant")
  assert (optimizer.b1, optimizer.b2) == (0.9, 0.95)
  assert (optimizer.weight_decay, optimizer.clip_norm) == (0.1, 1.0)


def test_an_ablation_changes_what_its_name_says():
  reference = ablations.ROWS["reference"]
  assert reference.training.steps == 50_000
  expected = {
    "samples_2": {"loss.samples": (8, 2)},
    "draws_16": {"loss.posterior_draws": (100, 16)},
    "alpha_1.75": {"loss.alpha": (1.0, 1.75)},
    "alpha_2": {"loss.alpha": (1.0, 2.0)},
    "input_both": {"model.input": ("discrete", "both")},
    "head_flow": {"head.kind": ("energy", "flow")},
    "samples_8": {},
  }
  for name, changes in expected.items():
    assert resolve.differences(reference, ablations.ROWS[name]) == changes, name
  autoencoders = {
    "ae_plain": {"kl_weight": 0.0, "kl_floor": 0.0, "drop_token": 0.0, "drop_latent": 0.0},
    "ae_kl": {"kl_weight": 1e-3, "kl_floor": 0.0, "drop_token": 0.0, "drop_latent": 0.0},
    "ae_kl_floor": {"kl_weight": 1e-3, "kl_floor": 0.5, "drop_token": 0.0, "drop_latent": 0.0},
    "ae_drop_token": {"kl_weight": 1e-3, "kl_floor": 0.5, "drop_token": 0.15, "drop_latent": 0.0},
    "ae_reference": {"kl_weight": 1e-3, "kl_floor": 0.5, "drop_token": 0.15, "drop_latent": 0.15},
  }
  for name, values in autoencoders.items():
    loss = vars(ablations.ROWS[name].loss)
    assert {key: loss[key] for key in values} == values, name


def test_patch_sizes_have_latents_to_match_and_2048_patches():
  for k in (1, 2, 4, 8):
    autoencoder_run = ablations.ROWS[f"ae_k_{k}"]
    sizes = autoencoder_run.model
    assert (sizes.patch_size, sizes.latent) == (k, 32 * k)
    run = ablations.ROWS[f"k_{k}"]
    assert (run.data.context, run.model.patch_size) == (2048 * k, k)
    assert ablations.get_companions(f"k_{k}") == config.Companions(
      parents={"autoencoder": autoencoder_run}
    )


def test_each_size_names_the_vocabulary_and_the_autoencoder_that_go_with_it():
  published = config.Companions(LLAMA3)
  script = (ROOT / "launch/quickstart.sh").read_text()
  trained = re.search(r"--tokenizer=train:(\d+)", script)
  assert trained
  small = config.Companions(int(trained[1]), {"autoencoder": autoencoder_config.QUICKSTART})
  for module in (autoencoder_config, calm_config, transformer_config):
    for size in module.SIZES:
      expected = small if size == "quickstart" else published
      assert module.get_companions(size) == expected, (module.__name__, size)
  for name in ablations.ROWS:
    companions = ablations.get_companions(name)
    run = ablations.ROWS[name]
    parents = untrained.parent_runs(run, companions.parents)
    table.of(run).check(run, parents, LLAMA3, {"autoencoder": (name, "")})
    assert companions.vocab_size == LLAMA3


def test_every_row_is_in_the_docstring_and_can_be_given_as_flags():
  words = set(re.findall(r"\w[\w.]*\w|_\w+", ablations.__doc__ or ""))
  for name in ablations.ROWS:
    assert name in words or f"_{name.rpartition('_')[2]}" in words, name
    assert table.run_from(dataclasses.asdict(ablations.ROWS[name])) == ablations.ROWS[name]


@pytest.mark.parametrize(
  ("name", "published"), [("k_1", 30.4), ("k_2", 15.4), ("k_4", 7.9), ("k_8", 4.2)]
)
def test_training_flops_are_near_the_published(name: str, published: float):
  """In 1e20 FLOPs, within a quarter: the paper does not state what it counts."""
  run, k = ablations.ROWS[name], int(name[2:])
  parents = {"autoencoder": ablations.ROWS[f"ae_k_{k}"]}
  total = counting.train_per_token(run, parents, LLAMA3) * run.training.steps * PUBLISHED_STEP
  assert total / 1e20 == pytest.approx(published, rel=0.25)
