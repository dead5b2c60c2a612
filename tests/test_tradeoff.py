"""Claims about accuracy and collision at several temperatures."""

import pathlib

import jax
import numpy as np
import pytest

from calm_jax import errors
from calm_jax.data import pipeline, synthetic
from calm_jax.generation import requests, tradeoff
from calm_jax.models import layers
from calm_jax.running import loading

FIRST, PUBLISHED = requests.Sampler(), requests.Sampler("none", "batch")


def test_each_sampler_temperature_and_number_of_candidates_is_a_row(trained_calm: pathlib.Path):
  trained = loading.load(str(trained_calm))
  store = synthetic.open_store(trained.run.data.path)
  rows = tradeoff.of_calm(trained, store, (1.0, 0.5), (4, 16), (FIRST, PUBLISHED), 20, seed=0)
  settings = [(row["rule"], row["temperature"], row["num_candidates"]) for row in rows]
  assert settings == [
    ("first", 1.0, 1),
    ("first", 0.5, 4),
    ("first", 0.5, 16),
    ("none", 1.0, 1),
    ("none", 0.5, 4),
    ("none", 0.5, 16),
  ]
  draws = [row["draws"] for row in rows]
  assert draws[3:] == [1, 4, 16] and draws[0] == 1 and draws[2] <= 16
  assert all(row["patches"] == 20 and len(row["accuracy"]) == 4 for row in rows)
  same = [rows[0][name] == rows[3][name] for name in ("accuracy", "collision")]
  assert all(same)  # At temperature 1 the only draw is taken.


def test_the_baselines_figures_are_computed_from_its_probabilities(
  trained_transformer: pathlib.Path,
):
  trained = loading.load(str(trained_transformer), "transformer")
  store = synthetic.open_store(trained.run.data.path)
  (row,) = tradeoff.of_transformer(trained, store, (0.5,), (), (), 31, 0)
  ((batch, _),) = pipeline.heldout_batches(store, 32, 1, 1)
  token_1S = batch["tokens"]
  hidden_1SD, _ = layers.apply(trained.model, trained.params, token_1S[:, :-1], method="hidden")
  logits_SV = layers.apply(trained.model, trained.params, hidden_1SD[0], method="logits")
  p_SV = np.asarray(jax.nn.softmax(2 * logits_SV, axis=-1))
  accuracy = p_SV[np.arange(31), token_1S[0, 1:]].mean()
  np.testing.assert_allclose(row["accuracy"], [100 * accuracy], rtol=1e-5)
  np.testing.assert_allclose(row["collision"], [100 * (p_SV**2).sum(axis=1).mean()], rtol=1e-5)


def test_impossible_settings_are_refused(trained_calm: pathlib.Path):
  trained = loading.load(str(trained_calm))
  store = synthetic.open_store(trained.run.data.path)
  for temperatures, numbers, reason in (
    ((1.5,), (4,), "got 1.5"),
    ((0.25,), (3,), "at least 1/temperature = 4, got 3"),
  ):
    with pytest.raises(errors.CalmError, match=reason):
      tradeoff.of_calm(trained, store, temperatures, numbers, (FIRST,), 4, 0)
