"""Claims about the benchmarks: what they compare is equal, and the figures are all there."""

import json

import pytest

from calm_jax import files
from calm_jax.benchmarking import evaluation


def test_branches_and_passes_give_the_same_hidden_states(monkeypatch: pytest.MonkeyPatch):
  for name, value in (("BLOCKS", 1), ("PATCHES", 16), ("VOCAB", 32), ("REPETITIONS", 1)):
    monkeypatch.setattr(evaluation, name, value)
  lines, figures = evaluation.measure()
  assert [row["patch_size"] for row in figures] == [1, 2] and len(lines) == 2
  for row in json.loads(files.to_json({"figures": figures}))["figures"]:
    assert row["largest_difference"] < 1e-4
    assert row["speedup"] == row["passes_seconds"] / row["branches_seconds"] > 0
