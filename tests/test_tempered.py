"""Claims about tempered heads: one draw at any temperature, beside a model that stays as it is."""

import contextlib
import dataclasses
import json
import pathlib
import re
import runpy
import subprocess
import sys

import counted as counted_lib
import jax
import numpy as np
import optax
import processes
import pytest
from jax import numpy as jnp

from calm_jax import config, errors
from calm_jax.data import synthetic
from calm_jax.generation import candidates, cost, requests, tradeoff
from calm_jax.models.heads import head, registry, tempered
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.planning import writing
from calm_jax.running import counting, loading, starting, texts, train, untrained
from calm_jax.stages import calm as calm_stage
from calm_jax.stages import table
from calm_jax.stages import tempered as tempered_stage

PROMPT = tuple(range(20, 28))
DIRECT = requests.Sampler("direct")


def generated(
  directory: pathlib.Path, batch: list[requests.Request], sampler: requests.Sampler
) -> tuple[list[list[int]], list[list[int]], list[str]]:
  """Returns each text's tokens and draws per patch, and the decoder's notes."""
  notes: list[str] = []
  decoder = texts.decoder(loading.load(str(directory)), sampler, notes.append)
  written = decoder.start(batch).advance(4)
  return [text.tokens for text in written], [text.drawn for text in written], notes


def request(temperature: float, number: int = 0, **settings) -> requests.Request:
  return requests.Request(PROMPT, temperature, max_tokens=16, number=number, **settings)


def test_the_features_are_zero_at_temperature_one_and_differ_elsewhere():
  feature_s9 = np.asarray(tempered.features(jnp.array([1.0, 2.0, 4.0])))
  log = np.log(2.0)
  expected = [log, *np.sin([log, 2 * log, 4 * log, 8 * log])]
  assert feature_s9.shape == (3, 9) and not feature_s9[0].any()
  np.testing.assert_allclose(feature_s9[1, :5], expected, rtol=1e-5)
  np.testing.assert_allclose(feature_s9[1, 5:], np.cos(log * np.array([1, 2, 4, 8])) - 1, 1e-4)


@pytest.mark.parametrize("kind", ["energy", "flow", "diffusion"])
def test_an_untrained_embedding_leaves_every_head_as_it_is(kind: str):
  sizes = config.Head(kind=kind, blocks=1, noise=4, steps=0 if kind == "energy" else 4)
  trunk = head.Trunk(16, 8, "fan_in")
  own = registry.build(sizes, trunk)
  model = tempered.Tempered(own, trunk)
  params = jax.tree.map(lambda x: x + 0.01, model.initial(jax.random.key(0)))
  params["power"]["power_out"] = jax.tree.map(jnp.zeros_like, params["power"]["power_out"])
  hidden_3D = jax.random.normal(jax.random.key(1), (3, 16))
  power_3 = jnp.array([1.0, 2.0, 4.0])
  drawn = model.sample(params, hidden_3D, power_3, jax.random.key(2), 5)
  np.testing.assert_array_equal(drawn, own.sample(params["head"], hidden_3D, jax.random.key(2), 5))
  params["power"]["power_out"] = jax.tree.map(jnp.ones_like, params["power"]["power_out"])
  moved = model.sample(params, hidden_3D, power_3, jax.random.key(2), 5)
  assert np.abs(moved - drawn).max() > 1e-3


def test_training_starts_from_the_models_head_and_leaves_the_model_as_it_is(
  tempered_run: tempered_stage.Run, trained_tempered: pathlib.Path, trained_calm: pathlib.Path
):
  parent, trained = loading.load(str(trained_calm)), loading.load(str(trained_tempered))
  start = starting.prepare(tempered_run, str(trained_tempered / "new"), False)
  jax.tree.map(np.testing.assert_array_equal, start.initial["head"], parent.params["head"])
  assert trained.parents["calm"].fingerprint == parent.fingerprint
  assert trained.origin.parents == {"calm": parent.fingerprint}
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), trained.params, start.initial)
  assert min(jax.tree.leaves(moved)) > 0


def test_the_start_is_a_copy_so_that_training_can_overwrite_it(
  tempered_run: tempered_stage.Run, trained_calm: pathlib.Path, tmp_path: pathlib.Path
):
  start = starting.prepare(tempered_run, str(tmp_path / "run"), False)
  jax.tree.map(lambda x: x.delete(), start.initial["head"])
  jax.tree.map(np.asarray, start.parents["calm"].params["head"])


def test_at_temperature_one_the_text_is_the_language_models(
  trained_tempered: pathlib.Path, trained_calm: pathlib.Path
):
  batch = [request(1.0, 0), request(1.0, 1)]
  own, _, _ = generated(trained_calm, batch, requests.Sampler())
  assert generated(trained_tempered, batch, DIRECT)[0] == own


def test_one_draw_decides_at_every_trained_temperature_whatever_else_is_in_the_batch(
  trained_tempered: pathlib.Path,
):
  batch = [request(value, i) for i, value in enumerate((1.0, 0.7, 0.5, 0.25))]
  tokens, draws, notes = generated(trained_tempered, batch, DIRECT)
  assert draws == [[1, 1, 1, 1]] * 4 and not notes
  for i, single in enumerate(batch):
    assert generated(trained_tempered, [single], DIRECT)[0] == [tokens[i]]


def test_below_the_trained_range_races_run_over_draws_at_its_end(trained_tempered: pathlib.Path):
  _, draws, (note,) = generated(trained_tempered, [request(0.125)], DIRECT)
  assert min(draws[0]) >= 2
  expected = (
    "temperature 0.125 is below [0.25, 1], for which the head was trained: races of power 2 "
  )
  assert note == expected + "over draws at 0.25"
  with pytest.raises(errors.CalmError, match="draws' temperature/temperature = 2, got 1"):
    generated(trained_tempered, [request(0.125, num_candidates=1)], DIRECT)


def test_other_rules_race_over_draws_at_one_or_at_a_temperature_that_is_asked_for(
  trained_tempered: pathlib.Path, trained_calm: pathlib.Path
):
  first = requests.Sampler("first")
  race = generated(trained_tempered, [request(0.5)], first)
  assert race == generated(trained_calm, [request(0.5)], first)
  law = texts.decoder(
    loading.load(str(trained_tempered)), requests.Sampler("first", "prefix", 0.5), print
  ).law
  assert law.powers(request(0.25)) == (2, 2)
  assert law.powers(request(0.5)) == (2, 1) and law.powers(request(1.0)) == (1, 1)


def test_what_a_head_was_not_trained_for_is_refused_in_one_line(
  trained_tempered: pathlib.Path, trained_calm: pathlib.Path
):
  with pytest.raises(
    errors.CalmError, match=r"draw_temperature=0\.1 is outside .* in \[0\.25, 1\]"
  ):
    generated(trained_tempered, [request(0.1)], requests.Sampler("first", "prefix", 0.1))
  with pytest.raises(errors.CalmError, match=r"--config=tempered\.py:SIZE --config\.calm=WORKDIR"):
    generated(trained_calm, [request(0.5)], DIRECT)


def test_sizes_other_than_the_models_are_refused(tempered_run: tempered_stage.Run, tmp_path):
  model = dataclasses.replace(tempered_run.model, layers=3)
  run = dataclasses.replace(tempered_run, model=model)
  with pytest.raises(errors.CalmError, match=r"other sizes .*: give --config\.model\.layers=2$"):
    train.train_run(run, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_what_has_no_size_may_differ_from_the_model(tempered_run: tempered_stage.Run, tmp_path):
  """An imported model's scheme of initial values is the reference's."""
  model = dataclasses.replace(tempered_run.model, init="reference")
  head = dataclasses.replace(tempered_run.head, steps=3)
  run = dataclasses.replace(tempered_run, model=model, head=head)
  starting.prepare(run, str(tmp_path / "run"), False)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"least_temperature": 1.0}, r"must lie in \(0, 1\), got 1.0"),
    ({"num_candidates": 3}, "num_candidates must be at least 1/least_temperature = 4, got 3"),
    ({"rule": "direct"}, "the race must compare draws, .* got direct:prefix"),
    ({"samples": 1}, "at least 2 for the repulsion, got 1"),
    ({"alpha": 2.5}, r"alpha must lie in \(0, 2\], got 2.5"),
    ({"brier": -1.0}, r"brier must not be negative, got -1.0"),
    ({"sharpening": 1.0}, r"sharpening must lie in \[0, 1\), got 1.0"),
    ({"at_limit": "error"}, "got first:error"),
  ],
)
def test_impossible_settings_are_refused(settings: dict, message: str):
  with pytest.raises(errors.CalmError, match=message):
    tempered_stage.Loss(**settings)


@contextlib.contextmanager
def functions_of(log_std: float, kind: str = "energy", **settings):
  """Yields a stage's functions, parameters and a batch, in its mesh, of a head of some kind.

  `log_std` is added to all posteriors' log std.
  """
  run = tempered_stage.Run(
    data=config.Data("", 16),
    model=config.Backbone(layers=1, width=16, ffn=32, heads=2, kv_heads=2, init="fan_in"),
    head=config.Head(kind, blocks=1, noise=4, steps=0 if kind == "energy" else 2),
    loss=tempered_stage.Loss(samples=3, every=2, races=2, num_candidates=6, **settings),
    training=config.Training(batch=2, compute_dtype="float32"),
    mesh=config.Mesh(fsdp=1),
  )
  parents = {
    "calm": calm_stage.Run(model=run.model, head=run.head),
    "autoencoder": table.STAGES["autoencoder"].run(
      model=config.Autoencoder(width=16, ffn=32, latent=4, init="fan_in")
    ),
  }

  def noisy(initial):
    params = initial(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)

  token_BS = np.random.default_rng(0).integers(0, 32, (2, 16), dtype=np.int32)
  with jax.set_mesh(mesh_lib.build(run.mesh, jax.devices()[:1])):
    functions = untrained.functions(run, parents, 32, noisy)
    frozen = functions.frozen
    bias = frozen["autoencoder"]["encoder"]["posterior"]["bias"]
    frozen["autoencoder"]["encoder"]["posterior"]["bias"] = bias.at[len(bias) // 2 :].add(log_std)
    batch = {"tokens": token_BS, "index": np.arange(2, dtype=np.int32)}
    yield functions, noisy(functions.init), batch


def stage_loss(log_std: float, kind: str = "energy", **settings) -> dict[str, float]:
  """Returns loss, metrics and the gradient's norm of one batch; see `functions_of`."""
  with functions_of(log_std, kind, **settings) as (functions, params, batch):
    frozen = functions.frozen
    value_and_gradient = jax.jit(jax.value_and_grad(functions.loss, has_aux=True))
    (loss, metrics), gradient = value_and_gradient(params, frozen, batch, jax.random.key(2))
    figures = {"loss": loss, "gradient_norm": optax.tree.norm(gradient), **metrics}
  return {name: float(x) for name, x in figures.items()}


def test_targets_are_draws_of_the_winners_posterior():
  one, wider = stage_loss(0.0, brier=0.0), stage_loss(1.0, brier=0.0)
  assert one["repulsion"] == wider["repulsion"] > 0
  assert wider["attraction"] > one["attraction"] * 1.01
  np.testing.assert_allclose(one["loss"], 2 * one["attraction"] - one["repulsion"], rtol=1e-5)


def test_the_loss_adds_the_prefixes_brier_score_with_less_weight_on_collisions():
  plain, proper = stage_loss(0.0, brier=0.0), stage_loss(0.0, brier=5.0, sharpening=0.0)
  assert "prefix_brier" not in plain and plain["attraction"] == proper["attraction"]
  expected = plain["loss"] - 5.0 * proper["prefix_brier"] / 100
  np.testing.assert_allclose(proper["loss"], expected, rtol=1e-5)
  sharper = stage_loss(0.0, brier=5.0, sharpening=0.5)
  assert sharper["prefix_brier"] == proper["prefix_brier"]
  # T >= 1/4, so that the collision, of at most 1, weighs at least 1 - 0.5 * 15/16.
  assert proper["loss"] - 5.0 * 0.5 * 15 / 16 < sharper["loss"] < proper["loss"]


def test_near_temperature_one_the_collision_has_its_whole_weight():
  near = dict(least_temperature=0.999, brier=5.0)
  proper, sharper = (stage_loss(0.0, sharpening=x, **near) for x in (0.0, 0.5))
  assert 0 < proper["loss"] - sharper["loss"] < 5.0 * 0.5 * (1 - 0.999**2)


def test_each_position_is_scored_against_its_own_first_winner():
  with functions_of(0.0) as (functions, params, batch):
    own, key = functions.loss.__self__, jax.random.key(2)
    positions = own._read(functions.frozen, batch, key)
    keys = positions.key_B
    pool_BpNK = own._pools(functions.frozen, positions.hidden_BpD, keys, 6)
    power_BR, winner_BRK = own._races(pool_BpNK, keys)

    @jax.jit
    def losses(winner_BRK):
      job = (params, functions.frozen, positions, pool_BpNK, power_BR, winner_BRK)
      return own._brier(*job)[0]

    first_Bp = losses(winner_BRK)
    np.testing.assert_array_equal(losses(winner_BRK.at[:, 1::2].set(-1)), first_Bp)
    # Nothing is drawn that equals -1, so that the accuracy of this position alone is lost.
    changed_Bp = np.asarray(losses(winner_BRK.at[1, 2].set(-1)) - first_Bp)
  assert changed_Bp[1, 1] > 0 and np.count_nonzero(changed_Bp) == 1


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
def test_heads_of_several_steps_are_trained_through_them(kind: str):
  plain, scored = (stage_loss(0.0, kind, brier=brier, sharpening=0.0) for brier in (0.0, 5.0))
  expected = plain["loss"] - 5.0 * scored["prefix_brier"] / 100
  np.testing.assert_allclose(scored["loss"], expected, rtol=1e-5)
  assert abs(scored["gradient_norm"] / plain["gradient_norm"] - 1) > 1e-3


def test_the_distance_of_two_laws_is_unbiased():
  """Two laws over two tokens: P = (0.8, 0.2), Q = (0.5, 0.5), so Σ (P − Q)² = 0.18."""
  generator, count = np.random.default_rng(0), 200_000

  def outcome(p: float) -> tradeoff._Outcome:
    def choice() -> candidates.Choice:
      token_PK = (generator.random((count, 1)) < p).astype(np.int32)
      ones_P = np.ones(count, np.int32)
      patch = candidates.Candidate(token_PK, None)
      return candidates.Choice(patch, ones_P > 0, ones_P, ones_P, ones_P, ones_P)

    return tradeoff._Outcome(choice(), choice())

  near = tradeoff._distance(outcome(0.5), outcome(0.5))
  far = tradeoff._distance(outcome(0.8), outcome(0.5))
  assert abs(near["distance"][0]) < 4 * near["distance_error"][0] < 1.5
  assert far["distance"][0] == pytest.approx(18, abs=4 * far["distance_error"][0])


def test_each_sampler_is_compared_with_the_first_at_the_same_temperature(
  trained_tempered: pathlib.Path,
):
  trained = loading.load(str(trained_tempered))
  store = synthetic.open_store(trained.run.data.path)
  samplers = (DIRECT, requests.Sampler("first"))
  rows = tradeoff.of_tempered(trained, store, (1.0, 0.5, 0.125), (8,), samplers, 20, seed=0)
  taken = [(row["rule"], row["temperature"], row["num_candidates"]) for row in rows]
  assert taken[:3] == [("direct", 1.0, 1), ("direct", 0.5, 1), ("direct", 0.125, 8)]
  assert taken[3:] == [("first", 1.0, 1), ("first", 0.5, 8), ("first", 0.125, 8)]
  assert [row["draws"] for row in rows[:2]] == [1, 1] and rows[2]["draws"] > 1
  assert ["distance" in row for row in rows] == [False] * 3 + [True] * 3
  assert rows[3]["accuracy"] == rows[0]["accuracy"]  # At temperature 1 both take the same draw.
  parent = trained.parents["calm"]
  own = tradeoff.of_calm(parent, store, (1.0, 0.5), (8,), samplers[1:], 20, seed=0)
  assert next(row["accuracy"] for row in own) == rows[3]["accuracy"]


def test_evaluation_compares_one_draw_with_the_race(trained_tempered: pathlib.Path):
  lines = (trained_tempered / "metrics.jsonl").read_text().splitlines()
  line = next(line for line in reversed(lines) if '"evaluation"' in line)
  names = set(re.findall(r'"(\w+_at_[\d.]+)"', line))
  figures = ("accuracy", "accuracy_gap", "collision", "collision_gap", "distance")
  assert names == {f"{name}_at_{value}" for name in figures for value in (0.7, 0.5, 0.333)}


def test_perfect_agreement_has_no_gap_and_no_distance():
  same_NpK = jnp.zeros((4, 3, 2), jnp.int32)
  figures = tempered_stage._compared(same_NpK, same_NpK[:2], same_NpK[0])
  for name in ("accuracy_gap", "collision_gap", "distance"):
    np.testing.assert_array_equal(figures[name], np.zeros((3, 2)))
  other = tempered_stage._compared(same_NpK, same_NpK[:2] + 1, same_NpK[0])
  np.testing.assert_array_equal(other["distance"], np.full((3, 2), 2.0))
  np.testing.assert_array_equal(other["accuracy_gap"], np.ones((3, 2)))


def test_one_draw_costs_what_a_draw_at_temperature_one_costs():
  run = calm_stage.Run()
  parents = {"autoencoder": table.STAGES["autoencoder"].run()}

  def flops(**settings) -> float:
    job = cost.WritingJob(run, parents, 128_256, 2048, **settings)
    return sum(part.flops for part in writing.parts(job))

  assert flops() < flops(is_direct=True) < 1.001 * flops()
  equal = cost.WritingJob(
    table.STAGES["transformer"].run(model=config.Transformer(layers=12, width=768, ffn=2048)),
    {},
    128_256,
    8192,
  )
  assert flops(is_direct=True) <= 0.7 * sum(part.flops for part in writing.parts(equal))


def test_a_training_step_computes_what_is_counted():
  sizes = config.Autoencoder(width=32, ffn=64, latent=16, init="fan_in")
  run = tempered_stage.Run(
    data=config.Data("", 64),
    model=config.Backbone(layers=1, width=32, ffn=64, heads=2, kv_heads=2, init="fan_in"),
    head=config.Head(blocks=2, noise=8),
    loss=tempered_stage.Loss(samples=4, every=5, races=2, num_candidates=8),
    training=config.Training(batch=2, compute_dtype="float32"),
    mesh=config.Mesh(fsdp=1),
    execution=config.Execution(attention="xla", unroll=True),
  )
  parents = {
    "calm": calm_stage.Run(model=run.model, head=run.head),
    "autoencoder": table.STAGES["autoencoder"].run(model=sizes),
  }
  computed = counted_lib.step_flops(run, parents, 64)
  # All 15 predicted positions of 16 patches are a multiple of `every`.
  counted = table.of(run).program_flops(run, parents, 64) * 2 * 15
  frozen = {"frozen backbone", "frozen input"}
  parts = table.of(run).flops(run, parents, 64)
  counted += sum(parts[name] for name in frozen) * 2  # The last patch is read, but not trained.
  assert computed == pytest.approx(counted, rel=0.02)


def test_the_published_recipe_costs_at_most_a_tenth_of_stage_two():
  path = pathlib.Path(__file__).parent.parent / "configs/tempered.py"
  settings = runpy.run_path(str(path))
  for size, run in settings["SIZES"].items():
    companions = settings["get_companions"](size)
    ancestors = untrained.parent_runs(run, companions.parents)
    own, parent = (
      counting.train_per_token(x, ancestors, companions.vocab_size)
      * x.training.steps
      * x.training.batch
      * x.data.context
      for x in (run, ancestors["calm"])
    )
    assert size == "quickstart" or own <= 0.1 * parent, (size, own / parent)


KNOWN_LAW = """
import json
from benchmarks import known_law
print(json.dumps(known_law.tempered_head()[1]))
"""


def test_one_draw_follows_a_known_law():
  """The total variation of rule `first` on that law is 0.07 and 0.12.

  Trained by a process with XLA's own optimisations, which tests switch off.
  """
  process = processes.start(sys.executable, "-c", KNOWN_LAW, XLA_FLAGS="")
  output, problem = process.communicate(timeout=300)
  assert process.returncode == 0, problem
  figures = json.loads(output)
  assert set(figures) == {"0.5", "0.333"} and max(figures.values()) <= 0.05


def test_the_command_writes_with_one_draw_by_default(trained_tempered: pathlib.Path):
  words = [f"--workdir={trained_tempered}", "--temperature=0.5", "--max_tokens=8", "--prompt="]
  done = subprocess.run(
    [sys.executable, "-m", "calm_jax.generate", *words], capture_output=True, check=True, text=True
  )
  assert "candidates a patch" not in done.stderr
  last = (trained_tempered / "samples.jsonl").read_text().splitlines()[-1]
  assert '"rule": "direct"' in last
