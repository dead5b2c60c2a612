"""Claims about conversion: weights survive export and import, and errors name what is wrong."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from folders import (
  GOLDEN,
  VOCAB,
  all_params,
  assert_same,
  converted,
  weights,
  with_table_twice,
)

from calm_jax import errors, workdir
from calm_jax.data import store as store_lib
from calm_jax.generation import requests
from calm_jax.interchange import tensors
from calm_jax.running import conversion, evaluating, loading, texts
from calm_jax.training import evaluation

MODELS = ("autoencoder", "energy", "flow", "diffusion", "ar")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", VOCAB)
def test_import_export_and_import_again_is_bit_exact(case, model, words, tmp_path):
  source, output = GOLDEN / case / model, tmp_path / "in"
  conversion.convert(str(source), str(output), "workdir", tokenizer=words(VOCAB[case]))
  conversion.convert(str(output), str(tmp_path / "out"), "reference")
  assert_same(weights(tmp_path / "out"), with_table_twice(weights(source)))
  conversion.convert(str(tmp_path / "out"), str(tmp_path / "again"), "workdir")
  first, second = loading.load(str(output)), loading.load(str(tmp_path / "again"))
  assert_same(all_params(first), all_params(second))
  assert (first.run, first.origin) == (second.run, second.origin)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_alone_opens_a_workdir(words, tmp_path):
  """It finds our names, with linear weights transposed and all layers stacked."""
  source = GOLDEN / "k4/energy"
  conversion.convert(str(source), str(tmp_path / "out"), "workdir", tokenizer=words(101))
  with ocp.StandardCheckpointer() as orbax:
    params = orbax.restore(tmp_path / "out/checkpoints/0/params")
    inner = orbax.restore(tmp_path / "out/autoencoder/checkpoints/0/params")
  theirs = weights(source)
  assert_same(params["backbone"]["input"]["up"]["kernel"], theirs["embed_proj.0.weight"].T)
  gate = [theirs[f"transformer.layers.{i}.mlp.gate_proj.weight"].T for i in range(2)]
  assert_same(params["backbone"]["llama"]["layers"]["mlp"]["gate"]["kernel"], np.stack(gate))
  assert_same(inner["embed"]["embedding"], theirs["ae_model.encoder.embed_tokens.weight"])
  sizes = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, inner))
  assert sum(sizes) == sum(x.size for x in theirs.values())


def test_an_exported_language_model_contains_its_autoencoder(folder, tmp_path):
  source = converted(folder)
  conversion.convert(str(tmp_path / "energy_workdir"), str(tmp_path / "out"), "reference")
  inner = tmp_path / "out/autoencoder"
  assert json.loads((tmp_path / "out/config.json").read_text())["ae_path"] == str(inner)
  assert_same(converted(inner).params, source.parents["autoencoder"].params)


def test_a_failure_while_writing_leaves_no_folder(trained_calm, tmp_path, monkeypatch):
  save = tensors.safetensors.numpy.save_file

  def wrong_order(arrays, path, metadata):
    save({name: -x for name, x in arrays.items()}, path, metadata)

  monkeypatch.setattr(tensors.safetensors.numpy, "save_file", wrong_order)
  with pytest.raises(errors.CalmError, match="does not read back as it was written"):
    conversion.convert(str(trained_calm), str(tmp_path / "out"), "reference")
  assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_refused(trained_calm, tmp_path):
  with pytest.raises(errors.CalmError, match="exists already: give a new --output"):
    conversion.convert(str(trained_calm), str(tmp_path), "reference")


@pytest.mark.parametrize("shard_bytes", [1, 20_000])
def test_shards_hold_the_same_weights_as_one_file(shard_bytes, folder, tmp_path, monkeypatch):
  expected = all_params(converted(folder))
  monkeypatch.setattr(tensors, "SHARD_BYTES", shard_bytes)
  conversion.convert(f"{folder}_workdir", str(tmp_path / "out"), "reference")
  index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
  files = list((tmp_path / "out").glob("*.safetensors"))
  assert len(files) == len(set(index["weight_map"].values())) > 1
  assert index["metadata"]["total_size"] == sum(
    x.nbytes for x in with_table_twice(weights(GOLDEN / "k4/energy")).values()
  )
  assert_same(all_params(converted(tmp_path / "out")), expected)


@pytest.mark.parametrize("name", ["autoencoder", "calm", "transformer"])
def test_a_model_scores_the_same_after_export_and_import(name, request, tokens, tmp_path):
  source = str(request.getfixturevalue(f"trained_{name}"))
  conversion.convert(source, str(tmp_path / "out"), "reference")
  conversion.convert(str(tmp_path / "out"), str(tmp_path / "back"), "workdir")
  there, back = loading.load(source), loading.load(str(tmp_path / "back"))
  assert_same(all_params(there), all_params(back))
  store = store_lib.TokenStore.open(tokens)
  workdir.require_same_tokenizer(back.origin, store, "back")
  figures = []
  for trained in (there, back):
    trained = dataclasses.replace(
      trained,
      run=dataclasses.replace(trained.run, loss=there.run.loss) if name == "calm" else trained.run,
    )
    stage, _ = evaluating.functions(trained)
    figures.append(evaluation.Evaluator(stage, store, 32, 4, 8, 0)(trained.params))
  assert figures[0] == figures[1]


def test_imported_weights_generate_from_a_prompt_of_one_patch(trained_calm, tmp_path):
  conversion.convert(str(trained_calm), str(tmp_path / "out"), "reference")
  back = converted(tmp_path / "out")
  decoder = texts.decoder(back, requests.Sampler(), print)
  writing = decoder.start([requests.Request(tuple(range(20, 24)), max_tokens=8)])
  assert len(writing.advance(2)[0].tokens) == 8 and writing.done
  with pytest.raises(errors.CalmError, match=r"prompt has 3 tokens.*at least a patch, 4 tokens"):
    decoder.start([requests.Request(tuple(range(3)))])


def test_a_format_that_a_stage_lacks_is_refused(
  trained_autoencoder, trained_transformer, trained_tempered, tmp_path
):
  for source, kind, reason in (
    (trained_autoencoder, "llama", "--format=llama is for transformer, but .*'autoencoder'"),
    (trained_transformer, "torch", "can be written as reference, llama"),
    (trained_tempered, "reference", "torch, stablehlo, onnx; .*/calm can be written as reference"),
  ):
    with pytest.raises(errors.CalmError, match=reason):
      conversion.convert(str(source), str(tmp_path / "out"), kind)


def test_the_model_card_shows_the_measured_figures(trained_calm, tmp_path):
  source = tmp_path / "source"
  shutil.copytree(trained_calm, source)
  figures = {"brier_lm": 12.5, "brier_lm_stderr": 0.25, "context_tokens": 32, "data": "/secret"}
  (source / workdir.EVALUATION).write_text(json.dumps(figures))
  conversion.convert(str(source), str(tmp_path / "out"), "reference")
  card = (tmp_path / "out/README.md").read_text()
  assert "| BrierLM | 12.50 ± 0.25 |" in card and "context in tokens 32" in card
  assert "/secret" not in card
  assert "Nothing yet" in (tmp_path / "out/autoencoder/README.md").read_text()


def test_converting_in_the_wrong_direction_is_refused(trained_calm, tmp_path):
  for source, kind, reason in (
    (trained_calm, "workdir", "is a workdir already; it can be written as reference"),
    (
      GOLDEN / "k4/energy",
      "torch",
      "of another framework: convert it with --format=workdir first",
    ),
  ):
    with pytest.raises(errors.CalmError, match=reason):
      conversion.convert(str(source), str(tmp_path / "out"), kind)


@pytest.mark.parametrize(("source", "output"), [("gs://b/a", "x"), ("{calm}", "gs://b/a")])
def test_buckets_are_refused(source, output, trained_calm, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  kind = "workdir" if output == "x" else "reference"
  with pytest.raises(errors.CalmError, match="gs://b/a is not a local folder"):
    conversion.convert(source.format(calm=trained_calm), output, kind)
  assert not list(tmp_path.iterdir())


def test_an_output_that_can_not_be_written_is_reported(trained_calm, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.CalmError, match="can't write --output="):
    conversion.convert(str(trained_calm), str(tmp_path / "file/out"), "reference")


def test_a_source_named_like_a_partial_output_survives(folder, tmp_path):
  source = tmp_path / "out.partial"
  folder.rename(source)
  conversion.convert(str(source), str(tmp_path / "out"), "workdir")
  assert source.exists() and (tmp_path / "out/config.json").exists()
