"""Claims about the stages: noise is keyed by an example's index, and settings have their effect."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import config, seal, sealed_json
from calm_jax.models import calm, layers
from calm_jax.objectives import autoencoding, brier, energy_score
from calm_jax.running import evaluating, loading, untrained
from calm_jax.stages import autoencoder as autoencoder_stage
from calm_jax.stages import calm as calm_stage
from calm_jax.stages import table
from calm_jax.stages import transformer as transformer_stage
from calm_jax.training import stage as stage_lib
from calm_jax.training import step
from calm_jax.training import trained as trained_lib

KEY = jax.random.key(0)


def stage_of(trained: trained_lib.Trained) -> stage_lib.Stage:
  return evaluating.functions(trained)[0]


@pytest.fixture(params=["autoencoder", "calm", "transformer"])
def stage_and_params(request: pytest.FixtureRequest):
  trained = loading.load(str(request.getfixturevalue(f"trained_{request.param}")))
  return stage_of(trained), trained.params


@pytest.fixture(scope="module")
def batch():
  return {
    "tokens": jax.random.randint(jax.random.key(1), (4, 32), 2, 300),
    "index": jnp.array([5, 9, 2, 70]),
  }


def rows(batch, indices):
  return jax.tree.map(lambda x: x[jnp.array(indices)], batch)


def test_an_example_has_the_same_noise_in_every_batch(stage_and_params, batch):
  stage, params = stage_and_params
  loss = jax.jit(stage.loss)
  whole, _ = loss(params, stage.frozen, batch, KEY)
  for parts in (([0], [1], [2], [3]), ([3, 1], [2, 0])):
    values = [loss(params, stage.frozen, rows(batch, part), KEY)[0] for part in parts]
    np.testing.assert_allclose(np.mean(values), whole, rtol=1e-5)
  shifted = {**batch, "index": batch["index"] + 1}
  evaluate = jax.jit(stage.evaluate)  # The baseline has noise only in its scores.
  before, after = (evaluate(params, stage.frozen, b, KEY) for b in (batch, shifted))
  assert max(np.abs(before[name] - after[name]).max() for name in before) > 1e-5


def test_accumulation_gives_the_gradients_of_the_whole_batch(stage_and_params, batch):
  stage, params = stage_and_params
  gradients = jax.jit(step.accumulated_gradients, static_argnums=(0, 5))
  (whole, _), (parts, _) = (
    gradients(stage.loss, params, stage.frozen, batch, KEY, count) for count in (1, 4)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), whole, parts)


def test_scores_have_one_row_per_example(stage_and_params, batch):
  stage, params = stage_and_params
  evaluate = jax.jit(stage.evaluate)
  whole = evaluate(params, stage.frozen, batch, KEY)
  part = evaluate(params, stage.frozen, rows(batch, [2, 0]), KEY)
  for name, values in whole.items():
    np.testing.assert_allclose(values[jnp.array([2, 0])], part[name], rtol=1e-4, atol=1e-6)


def test_a_parents_name_means_one_stage_and_no_other_part_of_a_workdir():
  """Flags, keys of seal.json and folders of a workdir are named by parents' names."""
  stages: dict[str, set[str]] = {}
  for spec in table.STAGES.values():
    for name, stage in spec.parents.items():
      stages.setdefault(name, set()).add(stage)
  assert stages and all(len(meanings) == 1 for meanings in stages.values())
  keys = {field.name for field in dataclasses.fields(seal.Seal)} - {"parents"}
  folders = {"checkpoints", "ledger", "profile", "format_version", sealed_json.FIELD}
  assert not stages.keys() & (keys | folders)


def test_a_parents_own_parents_are_copied_with_it(trained_calm, tmp_path):
  trained = loading.load(str(trained_calm))
  trained_lib.copy_parent(trained, "teacher", str(trained_calm), str(tmp_path / "teacher"))
  copy = loading.load(str(tmp_path / "teacher"), "calm")
  assert copy.fingerprint == trained.fingerprint
  assert copy.parents["autoencoder"].fingerprint == trained.parents["autoencoder"].fingerprint


def test_a_parents_own_parents_are_planned_with_it(monkeypatch: pytest.MonkeyPatch):
  spec = table.STAGES["transformer"]
  monkeypatch.setitem(
    table.STAGES, "transformer", dataclasses.replace(spec, parents={"teacher": "calm"})
  )
  autoencoder = autoencoder_stage.Run(model=config.Autoencoder(width=16, ffn=32, latent=8))
  run, runs = transformer_stage.Run(), {"autoencoder": autoencoder}
  teacher = untrained.trained(run, runs, 300, untrained.abstract).parents["teacher"]
  assert teacher.parents["autoencoder"].run == autoencoder
  assert teacher.model.sizes.latent == 8


def autoencoder_loss(run: autoencoder_stage.Run, params, batch, **changes):
  run = dataclasses.replace(run, loss=dataclasses.replace(run.loss, **changes))
  return untrained.functions(run, {}, 300, untrained.abstract).loss(params, {}, batch, KEY)


def test_the_autoencoders_loss_is_k_times_cross_entropy_plus_weighted_kl(
  trained_autoencoder, batch
):
  trained = loading.load(str(trained_autoencoder))
  value, metrics = autoencoder_loss(trained.run, trained.params, batch, kl_weight=0.25)
  expected = 4 * metrics["cross_entropy"] + 0.25 * metrics["kl"]
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  assert metrics["kl"] >= 8 * trained.run.loss.kl_floor - 1e-4


def test_dropped_tokens_are_replaced_in_the_input_and_stay_in_the_target(
  trained_autoencoder, batch
):
  """If all input is dropped, the posterior of every patch is that of the replacement id."""
  trained = loading.load(str(trained_autoencoder))
  kls = {}
  for id_ in (0, 7):
    _, metrics = autoencoder_loss(
      trained.run, trained.params, batch, drop_token=1 - 1e-7, drop_token_id=id_, kl_floor=0.0
    )
    posterior = layers.apply(trained.model, trained.params, jnp.full((4,), id_), method="encode")
    kls[id_] = autoencoding.floored_kl(*posterior, 0.0)
    np.testing.assert_allclose(metrics["kl"], kls[id_], rtol=1e-4)
    assert metrics["token_accuracy"] < 0.5
  assert abs(float(kls[0] - kls[7])) > 1e-4


def test_scores_of_the_language_model_equal_those_computed_by_hand(trained_calm, batch):
  """Draws the samples again from their keys, and computes the scores from them."""
  trained = loading.load(str(trained_calm))
  model, frozen = trained.model, trained.parents["autoencoder"].params
  stage, autoencoder = stage_of(trained), trained.parents["autoencoder"].model
  scores = jax.jit(stage.evaluate)(trained.params, frozen, batch, KEY)
  token_PK = batch["tokens"][1].reshape(-1, 4)
  hidden_1PD, _ = model.hidden(trained.params, token_PK[None, :-1])
  example = jax.random.fold_in(KEY, batch["index"][1])
  sample_NPZ = model.sample(trained.params, hidden_1PD[0], jax.random.fold_in(example, 2), 4)
  mean_PZ, log_std_PZ = layers.apply(autoencoder, frozen, token_PK[1:], method="encode")

  def distance(sample_NPZ, first):
    """Returns the mean distance to the posteriors of the patches from `first` on."""
    patches = slice(first, first + sample_NPZ.shape[1])
    posterior = (mean_PZ[patches], jnp.exp(log_std_PZ[patches]))
    return float(energy_score.expected_attraction(sample_NPZ, *posterior).mean())

  apart_NN = np.linalg.norm(sample_NPZ[:, None] - sample_NPZ[None], axis=-1).mean(axis=-1)
  energy = 2 * distance(sample_NPZ, 0) - apart_NN.sum() / 12
  np.testing.assert_allclose(scores["energy"][1], energy, rtol=1e-4)
  tokens_NPK = calm.decode_tokens(autoencoder, frozen, sample_NPZ)
  accuracy_Pn, collision_Pn = brier.accuracy(tokens_NPK, token_PK[1:]), brier.collision(tokens_NPK)
  np.testing.assert_allclose(scores["accuracy"][1], accuracy_Pn.mean(axis=0), rtol=1e-5)
  np.testing.assert_allclose(scores["collision"][1], collision_Pn.mean(axis=0), rtol=1e-5)

  gap = 2 * distance(sample_NPZ[:, :-1], 1) - 2 * distance(sample_NPZ[:, :-1], 0)
  np.testing.assert_allclose(scores["conditioning_gap"][1], gap, atol=1e-4)


def test_the_frozen_autoencoder_gets_no_gradient(trained_calm):
  """The trained parameters do not contain it; it is an argument of the loss."""
  trained = loading.load(str(trained_calm))
  assert set(trained.params) == {"backbone", "head"}
  assert not any("encoder" in str(path) for path, _ in jax.tree.leaves_with_path(trained.params))


@pytest.mark.parametrize("name", ["autoencoder", "calm", "transformer"])
def test_bfloat16_gives_nearly_the_loss_of_float32_and_float32_gradients(
  name: str, request: pytest.FixtureRequest, batch
):
  directory = str(request.getfixturevalue(f"trained_{name}"))
  values = []
  for dtype in ("float32", "bfloat16"):
    trained = loading.load(directory, dtype=dtype)
    stage, params = stage_of(trained), trained.params
    (value, _), grads = jax.jit(jax.value_and_grad(stage.loss, has_aux=True))(
      params, stage.frozen, batch, KEY
    )
    assert {x.dtype for x in jax.tree.leaves((params, value, grads))} == {jnp.dtype("float32")}
    values.append(float(value))
  assert values[0] != values[1] == pytest.approx(values[0], rel=0.02)


SHORT = config.Autoencoder(patch_size=2, width=16, ffn=24, latent=4, init="fan_in")


def short_patches(kind: str):
  """Returns an untrained model with K = 2, V = 12 and a nonzero output layer, and its stage."""
  sizes = config.Backbone(layers=2, width=16, ffn=24, heads=2, kv_heads=1, init="fan_in")
  run = calm_stage.Run(
    model=dataclasses.replace(sizes, input=kind, patch_size=2),
    head=config.Head(blocks=1, noise=4),
    loss=config.CalmLoss(samples=8, posterior_draws=2),
    training=config.Training(compute_dtype="float32"),
  )  # fmt: skip
  parents = {"autoencoder": autoencoder_stage.Run(model=SHORT)}
  keys = iter(jax.random.split(jax.random.key(0)))  # The autoencoder's, then the model's.
  trained = untrained.trained(run, parents, 12, lambda initial: initial(next(keys)))
  params = trained.params
  kernel = params["head"]["out"]["kernel"]
  params["head"]["out"]["kernel"] = 0.2 * jax.random.normal(jax.random.key(2), kernel.shape)
  return trained, stage_of(trained)


@pytest.mark.parametrize("kind", ["discrete", "continuous", "both"])
def test_scores_with_fewer_than_four_tokens_per_patch_follow_the_first_samples_path(kind: str):
  """K = 2, by hand: the second patch of each position comes from a pass over its text and path."""
  trained, stage = short_patches(kind)
  model, params, autoencoder = trained.model, trained.params, trained.parents["autoencoder"]
  frozen = autoencoder.params
  token_S = jax.random.randint(jax.random.key(4), (12,), 0, 12)
  batch = {"tokens": token_S[None], "index": jnp.array([7])}
  scores = jax.jit(stage.evaluate)(params, frozen, batch, KEY)

  example = jax.random.fold_in(KEY, 7)
  token_PK = token_S.reshape(-1, 2)
  mean_PZ, log_std_PZ = layers.apply(autoencoder.model, frozen, token_PK, method="encode")
  eps_1PZ = jax.random.normal(jax.random.fold_in(example, 0), (1, *mean_PZ.shape))
  latent_PZ = (mean_PZ + jnp.exp(log_std_PZ) * eps_1PZ[0]) if kind != "discrete" else mean_PZ

  @jax.jit
  def hidden(token_PK, latent_PZ):
    return model.hidden(params, token_PK[None], latent_PZ[None])[0][0]

  @jax.jit
  def draw(hidden_PD, number):
    sample = model.sample(params, hidden_PD, jax.random.fold_in(example, number), 8)
    return sample, calm.decode_tokens(autoencoder.model, frozen, sample)

  first_NPZ, first_NPK = draw(hidden(token_PK[:-1], latent_PZ[:-1]), 2)
  starts = 4  # 4 of the 5 predicted patches precede another one.
  ends = []
  for start in range(starts):
    text_PK = jnp.concatenate([token_PK[: start + 1], first_NPK[:1, start]])
    latents = jnp.concatenate([latent_PZ[: start + 1], first_NPZ[:1, start]])
    ends.append(hidden(text_PK, latents)[-1])
  _, second_NPK = draw(jnp.stack(ends), 3)

  within, whole = brier.collision(first_NPK)[:starts], brier.repeats(first_NPK)[:starts]
  collision_Pn = np.concatenate([within, whole[:, None] * brier.collision(second_NPK)], axis=1)
  np.testing.assert_allclose(scores["collision"][0], collision_Pn.mean(axis=0), atol=1e-5)
  right_PK = brier.accuracy(first_NPK, token_PK[1:])
  accuracy_Pn = np.concatenate([right_PK[:-1], right_PK[:-1, 1:] * right_PK[1:]], axis=1)
  np.testing.assert_allclose(scores["accuracy"][0], accuracy_Pn.mean(axis=0), atol=1e-5)
  assert 0 < collision_Pn[:, 3].mean() < collision_Pn[:, 0].mean() < 1


@pytest.mark.parametrize("kind", ["continuous", "both"])
def test_the_latent_input_is_trained(kind: str):
  """Its projection gets a gradient; there is no token embedding unless the input is `both`."""
  trained, stage = short_patches(kind)
  params, frozen = trained.params, stage.frozen
  batch = {"tokens": jnp.arange(12)[None] % 12, "index": jnp.array([7])}
  gradients = jax.jit(jax.grad(stage.loss, has_aux=True))
  grads, _ = gradients(params, frozen, batch, KEY)
  assert np.abs(grads["backbone"]["latent_in"]["kernel"]).max() > 0
  assert ("embed" in params["backbone"]) == (kind == "both")
