"""Claims about the benchmarks: what they compare is equal, and all figures are there."""

import dataclasses
import json
import pathlib
import re

import pytest

from benchmarks import (
  contenders,
  conversion,
  data,
  decoding,
  documents,
  evaluation,
  jobs,
  losses,
  peaks,
  training,
)
from calm_jax import config, errors, files
from calm_jax.stages import calm as calm_stage
from calm_jax.stages import transformer as transformer_stage


def test_branches_and_passes_give_the_same_hidden_states(monkeypatch: pytest.MonkeyPatch):
  for name, value in (("BLOCKS", 1), ("PATCHES", 16), ("VOCAB", 32), ("REPETITIONS", 1)):
    monkeypatch.setattr(evaluation, name, value)
  small = config.Backbone(layers=2, width=32, ffn=64, heads=2, kv_heads=2, init="fan_in")
  run = dataclasses.replace(evaluation.RUN, model=small, head=config.Head(blocks=1))
  monkeypatch.setattr(evaluation, "RUN", run)
  lines, figures = evaluation.measure()
  assert [row["patch_size"] for row in figures[:2]] == [1, 2]
  for row in figures[2:]:  # Where PyTorch is installed.
    assert row["evaluate_seconds"] > 0 and row["pytorch_seconds"] > 0
  assert len(lines) in (3, 4)
  for row in json.loads(files.to_json({"figures": figures[:2]}))["figures"]:
    assert row["largest_difference"] < 1e-4
    assert row["speedup"] == row["passes_seconds"] / row["branches_seconds"] > 0


def test_a_conversion_is_measured_both_ways(monkeypatch: pytest.MonkeyPatch):
  sizes = config.Backbone(layers=1, width=16, ffn=32, heads=2, kv_heads=2)
  monkeypatch.setattr(conversion, "RUN", calm_stage.Run(model=sizes))
  monkeypatch.setattr(conversion, "AUTOENCODER", config.Autoencoder(width=16, ffn=32, latent=8))
  monkeypatch.setattr(conversion, "VOCAB", 50)
  lines, figures = conversion.measure()
  assert [row["format"] for row in figures] == ["workdir", "torch"] and len(lines) == 2
  assert all(row["peak_bytes"] > row["weights_bytes"] > 0 for row in figures)


class Recorded:
  """Steps that record when they start and when they are waited for."""

  def __init__(self, lag: bool):
    self.lag, self.events = lag, []

  def dispatch(self):
    self.events.append("started")
    return (lambda: self.events.append("ended")) if self.lag else None

  def facts(self):
    return {}


def test_a_step_starts_before_its_predecessor_has_ended():
  steps = Recorded(lag=True)
  assert len(contenders.step_seconds(steps, 3)) == 3
  assert steps.events == ["started", "started", "ended", "started", "ended", "ended"]
  assert len(contenders.step_seconds(Recorded(lag=False), 3)) == 3


def test_training_is_measured_beside_contenders_that_are_missing_or_fail(
  monkeypatch: pytest.MonkeyPatch,
):
  """Each in its own process: the first is ours, one is not installed, one can't be built."""
  rows = (
    contenders.CONTENDERS[0],
    contenders.Contender("other", contenders._torch, ("no_such_package",)),
    contenders.Contender("broken", int),
  )
  monkeypatch.setattr(contenders, "CONTENDERS", rows)
  monkeypatch.setattr(contenders, "CPU", contenders.Turns(2, 2))
  run = transformer_stage.Run(
    data=config.Data(context=16),
    model=config.Transformer(layers=1, width=16, ffn=32, heads=2, kv_heads=2),
    training=config.Training(batch=2, compute_dtype="float32"),
    mesh=config.Mesh(fsdp=1),
  )
  job = jobs.BenchmarkJob("toy", run, {}, 64)
  lines, (figures,) = training.measure(job)
  ours, other, broken = figures["contenders"].values()
  assert ours["steps"] == 4 and ours["tokens_per_second"] == 32 / ours["step_seconds"]
  assert 0 <= ours["data_wait_share"] < 1 and ours["mfu"] > 0 and ours["save_seconds"] > 0
  assert "no_such_package" in other["error"] and broken["error"].startswith("TypeError")
  text = "\n".join(lines)
  assert "toy: 2 sequences of 16 tokens" in text and "not installed: no_such_package" in text
  json.dumps(figures, allow_nan=False)


def test_the_input_is_measured_for_both_tokenizers(monkeypatch: pytest.MonkeyPatch):
  for name, value in (("TEXT_BYTES", 2**18), ("VOCAB", 2048), ("SECONDS", 0.1), ("CONTEXT", 512)):
    monkeypatch.setattr(data, name, value)
  lines, figures = data.measure()
  kinds = [(row["tokenizer"], row["workers"]) for row in figures["preparing"]]
  assert {name for name, _ in kinds} == {"SentencePiece", "Llama 3's kind"}
  assert figures["reading_tokens_per_second"] > 0 and len(lines) == 1 + len(kinds)


def test_a_document_takes_its_blocks_from_the_files_it_names(tmp_path):
  record = documents.Record(
    "python -m calm_jax.benchmark --suite=x",
    "x",
    "abc",
    {"jax": "1"},
    {"A": "b"},
    "2 cores of X",
    ["fast"],
    {},
  )
  (tmp_path / "x.json").write_text(files.to_json(dataclasses.asdict(record)))
  (tmp_path / "page.md").write_text("before\n<!-- x.json -->\n```\nslow\n```\nafter\n")
  documents.update(str(tmp_path / "page.md"))
  text = (tmp_path / "page.md").read_text()
  assert text == (
    "before\n<!-- x.json -->\n```\n$ A=b python -m calm_jax.benchmark --suite=x\n"
    "  at commit abc, jax 1, 2 cores of X\nfast\n```\nafter\n"
  )
  documents.update(str(tmp_path / "page.md"))
  assert (tmp_path / "page.md").read_text() == text
  (tmp_path / "x.json").write_text("{}")
  with pytest.raises(errors.CalmError, match=r"x\.json holds no run of a benchmark"):
    documents.update(str(tmp_path / "page.md"))


def test_every_known_device_has_a_peak():
  assert peaks.of("NVIDIA H200") == 989.4e12 and peaks.of("TPU v5 lite") == 197e12
  assert peaks.of("cpu") is None


def test_decoding_measures_single_draws_of_a_tempered_head_beside_the_race(
  trained_tempered: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  sizes = dict(BATCHES=(2,), REPETITIONS=1, PROMPT_PATCHES=2, NEW_PATCHES=2, QUALITY_PATCHES=8)
  for name, value in sizes.items():
    monkeypatch.setattr(decoding, name, value)
  monkeypatch.setattr(decoding, "WAYS", [way for way in decoding.WAYS if way[2] > 0.4])
  for name in ("batch_bias", "first_bias", "tempered_head", "exact_law"):
    monkeypatch.setattr(decoding.known_law, name, lambda: ([], {}))
  lines, figures = decoding.measure(str(trained_tempered))
  rows = {row["way"]: row for row in figures["speeds"]}
  assert set(rows) == {"bare loop", "one draw", "published", "race", "direct"}
  assert rows["direct"]["draws"] == 1 and rows["race"]["draws"] > 1
  assert rows["direct"]["mflop"] == pytest.approx(rows["one draw"]["mflop"], rel=0.1)
  assert all(row["tokens_per_second"] > 0 for row in rows.values())
  (line,) = [line for line in lines if line.startswith("batch  2  direct")]
  assert re.search(r"1.0 draws a patch, .*; .* times one draw, .* published, .* race$", line)
  samplers = [(row["rule"], row["temperature"]) for row in figures["quality"]]
  assert [rule for rule, _ in samplers].count("direct") == 2


def test_losses_are_measured_with_their_errors(monkeypatch: pytest.MonkeyPatch):
  sizes = {"EXAMPLES": 2, "PATCHES": 4, "FEW_PATCHES": 2, "LATENT": 16, "MANY_DRAWS": 3000}
  sizes |= {"POSITIONS": 64, "WIDTH": 8, "VOCAB": 32, "REPETITIONS": 1}
  for name, value in sizes.items():
    monkeypatch.setattr(losses, name, value)
  lines, figures = losses.measure()
  pairs, draws, exact = figures["energy"]
  assert pairs["name"] == "whole array of pairs" and len(lines) == 7
  # 3,000 draws are nearer to the expectation than 100.
  assert exact["gradient_error"] < draws["gradient_error"] / 2 and exact["error"] < 0.02
  assert figures["cross_entropy"][1]["gradient_error"] < 1e-5
  assert all(row["seconds"] > 0 for rows in figures.values() for row in rows)
