"""Claims about costs: they are what the program computes, and agree with the published ones."""

import dataclasses

import jax
import pytest
from jax import numpy as jnp

from calm_jax import config
from calm_jax.generation import candidates, cost, requests
from calm_jax.models import memory
from calm_jax.planning import published, writing
from calm_jax.planning.compiled import matmuls, runs, topologies
from calm_jax.running import texts, untrained
from calm_jax.stages import autoencoder as autoencoder_stage
from calm_jax.stages import calm as calm_stage
from calm_jax.stages import transformer as transformer_stage

VOCAB, ROWS, WINDOW, DRAWS = 512, 8, 16, 3
SIZES = config.Autoencoder(width=64, ffn=128, latent=32)
PARENTS = {"autoencoder": autoencoder_stage.Run(model=SIZES)}
LAYERS = {"layers": 2, "width": 64, "ffn": 128, "heads": 4, "kv_heads": 2}


def program_flops(function, *inputs) -> float:
  """Returns the FLOPs of a function's matrix products, compiled for this machine."""
  compiled = jax.jit(function).lower(*inputs).compile()
  return matmuls.flops(runs.read(compiled.as_text()))


def law_of(run: calm_stage.Run | transformer_stage.Run):
  """Returns the distribution of the next patch, with abstract parameters."""
  trained = untrained.trained(run, PARENTS, VOCAB, untrained.abstract)
  return texts.decoder(trained, requests.Sampler(), print).law


@pytest.mark.parametrize("kind", ["energy", "flow", "diffusion", "transformer"])
def test_a_step_computes_what_is_counted(kind: str):
  """With attention to all slots of the cache: the program masks the empty ones."""
  float32 = config.Training(compute_dtype="float32")
  if kind == "transformer":
    run = transformer_stage.Run(model=config.Transformer(**LAYERS), training=float32)
  else:
    head = config.Head(kind=kind, blocks=2, steps=4 if kind != "energy" else 0)
    run = calm_stage.Run(model=config.Backbone(**LAYERS), head=head, training=float32)
  law = law_of(run)
  size = law.patch_size
  token_BPK = jax.ShapeDtypeStruct((ROWS, 1, size), jnp.int32)
  cache = memory.Cache.empty(WINDOW).allocated(run.model, ROWS, jnp.float32)
  advance = program_flops(lambda *x: law.advance(*x)[0], law.params, token_BPK, None, cache)
  key_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ROWS))
  hidden_BD = jax.ShapeDtypeStruct((ROWS, run.model.width), jnp.float32)

  def choose(params, hidden_BD, key_B):
    ones_B = jnp.ones(ROWS, jnp.int32)
    wanted = candidates.Wanted(
      key_B,
      3.0 * ones_B,
      1.0 * ones_B,
      DRAWS * ones_B,
      DRAWS * ones_B,
      jnp.zeros((ROWS, size), jnp.int32),
      0 * ones_B,
      ones_B > 0,
    )
    return law.choose(params, hidden_BD, wanted, DRAWS, [DRAWS * ROWS]).patch

  # The loop over rounds runs once, and has an unknown trip count, which is counted as one.
  chosen = program_flops(choose, law.params, hidden_BD, key_B)
  full = kind == "transformer"
  job = cost.WritingJob(run, PARENTS, VOCAB, WINDOW + 1, draws=DRAWS, batch=ROWS, full=full)
  # The program computes attention to the full window, the count has half of it.
  doubled = [
    dataclasses.replace(part, flops=2 * part.flops)
    if part.name == "attention" and not job.full
    else part
    for part in writing.parts(job)
  ]
  counted = sum(part.flops for part in doubled) * ROWS * size
  assert advance + chosen == pytest.approx(counted, rel=0.01)


def test_the_published_costs_agree_within_three_percent_but_those_listed():
  apart = set()
  for row in published.ROWS:
    for name, counted in (
      ("training", published.counted_training(row)),
      ("writing", published.counted_writing(row)),
    ):
      if abs(counted / getattr(row, name) - 1) > 0.03:
        apart.add((row.name, name))
  assert apart == published.APART


def test_two_hundred_draws_cost_seventy_times_the_transformer():
  medium, small = published.ROWS[0], published.EQUALS["CALM-M"]
  assert published.true_writing(medium, 200) == pytest.approx(3e10, rel=0.05)
  assert published.true_writing(medium, 200) / published.true_writing(small) == pytest.approx(
    70, rel=0.1
  )


def test_a_larger_batch_shares_the_weights():
  """By hand: a step of one text is bound by memory, a step of very many texts by compute."""
  row, chip = published.ROWS[3], topologies.CHIPS["v5e"]

  def bound(batch: int, window: int) -> tuple[float, str]:
    job = cost.WritingJob(row.run, {}, published.VOCAB, window, batch=batch)
    return writing.seconds(writing.parts(job), chip)

  alone, together = bound(1, 2), bound(4096, 2)
  assert (alone[1], together[1]) == ("memory", "compute")
  weights = 12 * (4 * 768**2 + 3 * 768 * 2048) + 768 * published.VOCAB
  assert alone[0] == pytest.approx(2 * weights / chip.bandwidth, rel=0.01)
