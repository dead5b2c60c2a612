"""Claims about the benchmarks: what they compare is equal, and the figures are all there."""

import json

import pytest

from calm_jax import config, files
from calm_jax.benchmarking import conversion, evaluation


def test_branches_and_passes_give_the_same_hidden_states(monkeypatch: pytest.MonkeyPatch):
  for name, value in (("BLOCKS", 1), ("PATCHES", 16), ("VOCAB", 32), ("REPETITIONS", 1)):
    monkeypatch.setattr(evaluation, name, value)
  lines, figures = evaluation.measure()
  assert [row["patch_size"] for row in figures] == [1, 2] and len(lines) == 2
  for row in json.loads(files.to_json({"figures": figures}))["figures"]:
    assert row["largest_difference"] < 1e-4
    assert row["speedup"] == row["passes_seconds"] / row["branches_seconds"] > 0


def test_a_conversion_is_measured_both_ways(monkeypatch: pytest.MonkeyPatch):
  sizes = config.Backbone(layers=1, width=16, ffn=32, heads=2, kv_heads=2)
  monkeypatch.setattr(conversion, "RUN", config.CalmRun(model=sizes))
  monkeypatch.setattr(conversion, "CODEC", config.Autoencoder(width=16, ffn=32, latent=8))
  monkeypatch.setattr(conversion, "VOCAB", 50)
  lines, figures = conversion.measure()
  assert [row["format"] for row in figures] == ["workdir", "torch"] and len(lines) == 2
  assert all(row["peak_bytes"] > row["weights_bytes"] > 0 for row in figures)
