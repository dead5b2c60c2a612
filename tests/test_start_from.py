"""Claims about `start_from`: a run starts from the weights of another workdir."""

import dataclasses

import jax
import numpy as np
import pytest
from folders import all_params, converted

from calm_jax import errors, workdir
from calm_jax.running import conversion, loading, train
from calm_jax.training import trainer


@pytest.mark.parametrize("name", ["autoencoder", "calm", "transformer"])
def test_training_starts_from_imported_weights(name, request, tmp_path):
  source = request.getfixturevalue(f"trained_{name}")
  run = request.getfixturevalue(f"{name}_run")
  conversion.convert(str(source), str(tmp_path / "out"), "reference")
  imported = converted(tmp_path / "out")
  start = str(tmp_path / "out_workdir")
  run = dataclasses.replace(
    run,
    start_from=start,
    optimizer=dataclasses.replace(run.optimizer, learning_rate=1e-9),
    training=dataclasses.replace(run.training, steps=2),
  )
  if name == "calm":
    run = dataclasses.replace(run, autoencoder="")
  train.train_run(run, str(tmp_path / "new"))
  trained = loading.load(str(tmp_path / "new"))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    all_params(trained),
    all_params(imported),
  )
  with pytest.raises(errors.CalmError, match=f"new --workdir with --config.start_from={start}"):
    train.train_run(run, start)


def test_weights_of_another_size_are_refused(trained_calm, calm_run, tmp_path):
  wider = dataclasses.replace(
    calm_run,
    autoencoder="",
    start_from=str(trained_calm),
    model=dataclasses.replace(calm_run.model, ffn=64),
  )
  with pytest.raises(errors.CalmError, match=r"of another size: give --config.model.ffn=32"):
    train.train_run(wider, str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


def test_a_run_interrupted_before_its_first_checkpoint_still_starts_from_the_weights(
  trained_transformer, transformer_run, tmp_path, monkeypatch
):
  run = dataclasses.replace(
    transformer_run,
    start_from=str(trained_transformer),
    optimizer=dataclasses.replace(transformer_run.optimizer, learning_rate=1e-9),
    training=dataclasses.replace(transformer_run.training, steps=2),
  )

  def interrupt(self):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(trainer.Trainer, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
      train.train_run(run, str(tmp_path / "new"))
  assert workdir.exists(str(tmp_path / "new"))
  train.train_run(run, str(tmp_path / "new"))
  params, expected = (
    loading.load(str(path)).params for path in (tmp_path / "new", trained_transformer)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected)
