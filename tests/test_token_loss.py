"""Claims about the token loss of stage two: what it is, what learns from it, and who sees it."""

import dataclasses
import json

import counted
import jax
import numpy as np
import pytest
from folders import converted
from jax import numpy as jnp
from safetensors.numpy import load_file

from calm_jax import config, errors, workdir
from calm_jax.models import layers
from calm_jax.running import conversion, evaluating, loading, train
from calm_jax.stages import calm as calm_stage
from calm_jax.stages import table
from calm_jax.training import stage as stage_lib

WEIGHT = 3.0
KEY = jax.random.key(0)


def with_token_loss(run: calm_stage.Run, **changes) -> calm_stage.Run:
  changes = {"token_weight": WEIGHT, "token_every": 2} | changes
  return dataclasses.replace(run, loss=dataclasses.replace(run.loss, **changes))


@pytest.fixture(scope="module")
def trained(trained_with_tokens):
  return loading.load(str(trained_with_tokens))


@pytest.fixture(scope="module")
def batch():
  tokens = jax.random.randint(jax.random.key(1), (4, 32), 2, 300)
  return {"tokens": tokens, "index": jnp.array([5, 9, 2, 70])}


def stage_of(trained, **changes) -> stage_lib.Stage:
  changed = dataclasses.replace(trained, run=with_token_loss(trained.run, **changes))
  return evaluating.functions(changed)[0]


def cross_entropies(trained, batch) -> np.ndarray:
  """Returns -log p of the tokens of all patches but the first, [B, P-1, K], by NumPy."""
  token_BPK = np.asarray(batch["tokens"]).reshape(4, 8, 4)
  hidden_BPD, _ = trained.model.hidden(trained.params, jnp.asarray(token_BPK))
  kernel_DF = np.asarray(trained.params["token_maps"]["up"]["kernel"], np.float64)
  table_VE = np.asarray(trained.parents["autoencoder"].params["embed"]["embedding"], np.float64)
  feature_BPKE = (np.asarray(hidden_BPD, np.float64) @ kernel_DF).reshape(4, 8, 4, -1)
  logits_BPKV = feature_BPKE[:, :-1] @ table_VE.T
  log_p_BPKV = logits_BPKV - np.log(np.exp(logits_BPKV).sum(-1, keepdims=True))
  return -np.take_along_axis(log_p_BPKV, token_BPK[:, 1:, :, None], axis=-1)[..., 0]


def test_the_loss_adds_the_weighted_cross_entropy_of_the_next_patch(trained, batch):
  plain, _ = stage_of(trained, token_weight=1e-30).loss(
    trained.params, stage_of(trained).frozen, batch, KEY
  )
  stage = stage_of(trained, token_every=1)
  value, metrics = stage.loss(trained.params, stage.frozen, batch, KEY)
  expected = cross_entropies(trained, batch)
  np.testing.assert_allclose(metrics["token_cross_entropy"], expected.mean(), rtol=1e-5)
  np.testing.assert_allclose(value - plain, WEIGHT * expected.mean(), rtol=1e-5)
  scores = stage.evaluate(trained.params, stage.frozen, batch, KEY)
  np.testing.assert_allclose(scores["token_cross_entropy"], expected.mean((1, 2)), rtol=1e-5)


def test_a_share_of_positions_has_the_mean_of_all(trained, batch):
  stage, expected = stage_of(trained, token_every=4), cross_entropies(trained, batch)
  loss = jax.jit(lambda key: stage.loss(trained.params, stage.frozen, batch, key)[1])
  values = [loss(key)["token_cross_entropy"] for key in jax.random.split(KEY, 200)]
  error = np.std(values) / np.sqrt(200)
  assert 0 < error < 0.1
  # Patches in blocks of four; the last one of the second block predicts nothing.
  np.testing.assert_allclose(np.mean(values), expected.mean(), atol=4 * error)


def test_one_position_in_every_block_is_picked_by_its_examples_key():
  x_BP = jnp.arange(24).reshape(2, 12)
  keys = jax.vmap(lambda i: jax.random.split(jax.random.key(i), 2))(jnp.arange(50))
  picked = np.asarray(jax.vmap(lambda key_B: stage_lib.one_in(3, x_BP, key_B))(keys))
  assert picked.shape == (50, 2, 4) and set(picked.ravel()) == set(range(24))
  assert np.all(np.diff(picked, axis=-1) == 3)
  assert len({tuple(x) for x in picked[:, :, 0] % 3}) == 9  # Examples differ.
  np.testing.assert_array_equal(stage_lib.one_in(1, x_BP, keys[0]), x_BP)


def test_trunk_and_maps_learn_from_it_and_the_head_does_not(trained, batch):
  stage = stage_of(trained)

  def token_loss(params):
    return stage.loss(params, stage.frozen, batch, KEY)[1]["token_cross_entropy"]

  largest = jax.tree.map(lambda x: float(np.abs(x).max()), jax.grad(token_loss)(trained.params))
  assert max(jax.tree.leaves(largest["head"])) == 0
  assert min(jax.tree.leaves(largest["token_maps"])) > 0
  assert largest["backbone"]["embed"]["embedding"] > 0


def test_without_a_weight_the_parameters_are_the_published_models(trained_calm, trained):
  published = loading.load(str(trained_calm))
  assert published.params.keys() == {"backbone", "head"}
  start = published.model.initial(KEY)
  own = trained.model.initial(KEY)
  jax.tree.map(np.testing.assert_array_equal, start, trained.model.drawing(own))


def test_draws_and_exports_are_those_of_the_model_without_maps(
  trained_with_tokens, trained, tmp_path
):
  plain = dataclasses.replace(trained, params=trained.model.drawing(trained.params))
  hidden_BD = jnp.ones((3, trained.run.model.width))
  np.testing.assert_array_equal(
    trained.model.sample(trained.params, hidden_BD, KEY, 2),
    plain.model.sample(plain.params, hidden_BD, KEY, 2),
  )
  for form in ("reference", "torch"):
    conversion.convert(str(trained_with_tokens), str(tmp_path / form), form)
    imported = converted(tmp_path / form)
    jax.tree.map(np.testing.assert_array_equal, imported.params, plain.params)
  conversion.convert(str(trained_with_tokens), str(tmp_path / "hlo"), "stablehlo")
  names = {name for path in (tmp_path / "hlo").glob("*.safetensors") for name in load_file(path)}
  assert {name.partition("/")[0] for name in names} == {"autoencoder", "backbone", "head"}


@pytest.mark.parametrize("had_maps", [False, True])
def test_weights_with_and_without_maps_are_trained_further(
  had_maps, calm_run, trained_calm, trained_with_tokens, tmp_path
):
  source = trained_with_tokens if had_maps else trained_calm
  run = calm_run if had_maps else with_token_loss(calm_run)
  optimizer = dataclasses.replace(run.optimizer, learning_rate=1e-9)
  run = dataclasses.replace(run, autoencoder="", start_from=str(source), optimizer=optimizer)
  train.train_run(run, str(tmp_path / "new"))
  before, after = loading.load(str(source)), loading.load(str(tmp_path / "new"))
  assert ("token_maps" in after.params) is not had_maps
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    *(x.model.drawing(x.params) for x in (before, after)),
  )


def test_it_is_reported_and_a_started_run_can_neither_add_nor_drop_it(
  calm_run, trained_with_tokens, trained_calm
):
  lines = (trained_with_tokens / workdir.METRICS).read_text().splitlines()
  last = {record["kind"]: record for record in map(json.loads, lines)}
  assert all(0 < last[kind]["token_cross_entropy"] < 9 for kind in ("train", "evaluation"))
  changing = train.Options(allow_config_change=True)
  for run, directory in (
    (calm_run, trained_with_tokens),
    (with_token_loss(calm_run), trained_calm),
  ):
    with pytest.raises(errors.CalmError, match=r"loss\.token_weight: .*Give a new --workdir or"):
      train.train_run(run, str(directory), changing)


def test_bad_settings_are_refused(calm_run, tmp_path):
  with pytest.raises(errors.CalmError, match="must divide the 8 patches of an example, got 3"):
    train.train_run(with_token_loss(calm_run, token_every=3), str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()
  with pytest.raises(errors.CalmError, match="token_weight must not be negative, got -1"):
    config.CalmLoss(token_weight=-1.0)


def test_a_training_step_computes_what_is_counted():
  run = calm_stage.Run(
    data=config.Data("", 64),
    model=config.Backbone(layers=1, width=32, ffn=64, heads=2, kv_heads=2, init="fan_in"),
    head=config.Head(blocks=2, noise=8),
    loss=config.CalmLoss(samples=4, posterior_draws=4, token_weight=1.0, token_every=4),
    training=config.Training(batch=2, compute_dtype="float32"),
    mesh=config.Mesh(fsdp=1),
    execution=config.Execution(attention="xla", unroll=True),
  )
  sizes = config.Autoencoder(width=32, ffn=64, latent=16, init="fan_in")
  parents = {"autoencoder": table.STAGES["autoencoder"].run(model=sizes)}
  without = dataclasses.replace(run, loss=dataclasses.replace(run.loss, token_weight=0.0))
  added = counted.step_flops(run, parents, 512) - counted.step_flops(without, parents, 512)
  expected = table.of(run).flops(run, parents, 512)["token loss"] * 2 * 16
  assert added == pytest.approx(expected, rel=0.02)


def test_features_of_each_place_are_a_map_of_the_hidden_state(trained):
  maps, params = trained.model.token_maps, trained.params["token_maps"]
  width, places = trained.run.model.width, trained.run.model.patch_size
  feature_KE = layers.apply(maps, params, jnp.ones((width,)))
  expected = np.asarray(params["up"]["kernel"]).sum(0).reshape(places, -1)
  np.testing.assert_allclose(feature_KE, expected, rtol=1e-5, atol=1e-6)
