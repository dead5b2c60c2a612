"""Claims about weights in and out: nothing is lost on the way, and what is wrong is named."""

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
from calm_jax.generation import decode, requests
from calm_jax.interchange import formats, tensors, to_workdir
from calm_jax.training import evaluation

MODELS = ("autoencoder", "energy", "flow", "diffusion", "ar")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", VOCAB)
def test_in_and_out_and_in_again_is_the_same_to_the_bit(case, model, words, tmp_path):
  source, output = GOLDEN / case / model, tmp_path / "in"
  to_workdir.write(str(source), str(output), tokenizer=words(VOCAB[case]))
  formats.convert(str(output), str(tmp_path / "out"), "reference")
  assert_same(weights(tmp_path / "out"), with_table_twice(weights(source)))
  to_workdir.write(str(tmp_path / "out"), str(tmp_path / "again"))
  first, second = workdir.load(str(output)), workdir.load(str(tmp_path / "again"))
  assert_same(all_params(first), all_params(second))
  assert (first.run, first.origin) == (second.run, second.origin)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_alone_opens_a_workdir(words, tmp_path):
  """Under our names, a Linear's weight turned, of the layers all in one."""
  source = GOLDEN / "k4/energy"
  to_workdir.write(str(source), str(tmp_path / "out"), tokenizer=words(101))
  with ocp.StandardCheckpointer() as orbax:
    found = orbax.restore(tmp_path / "out/checkpoints/0/params")
    inner = orbax.restore(tmp_path / "out/autoencoder/checkpoints/0/params")
  held = weights(source)
  assert_same(found["backbone"]["input"]["up"]["kernel"], held["embed_proj.0.weight"].T)
  gate = [held[f"transformer.layers.{i}.mlp.gate_proj.weight"].T for i in range(2)]
  assert_same(found["backbone"]["llama"]["layers"]["mlp"]["gate"]["kernel"], np.stack(gate))
  assert_same(inner["embed"]["embedding"], held["ae_model.encoder.embed_tokens.weight"])
  sizes = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (found, inner))
  assert sum(sizes) == sum(x.size for x in held.values())


def test_a_language_models_folder_holds_its_autoencoders(folder, tmp_path):
  source = converted(folder)
  formats.convert(str(tmp_path / "energy_workdir"), str(tmp_path / "out"), "reference")
  inner = tmp_path / "out/autoencoder"
  assert json.loads((tmp_path / "out/config.json").read_text())["ae_path"] == str(inner)
  assert_same(converted(inner).params, source.autoencoder.params)


def test_a_failure_while_writing_leaves_no_folder(trained_calm, tmp_path, monkeypatch):
  save = tensors.safetensors.numpy.save_file

  def wrong_order(arrays, path, metadata):
    save({name: -x for name, x in arrays.items()}, path, metadata)

  monkeypatch.setattr(tensors.safetensors.numpy, "save_file", wrong_order)
  with pytest.raises(errors.CalmError, match="does not read back as it was written"):
    formats.convert(str(trained_calm), str(tmp_path / "out"), "reference")
  assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_refused(trained_calm, tmp_path):
  with pytest.raises(errors.CalmError, match="exists already: give a new --output"):
    formats.convert(str(trained_calm), str(tmp_path), "reference")


@pytest.mark.parametrize("shard_bytes", [1, 20_000])
def test_shards_hold_what_one_file_holds(shard_bytes, folder, tmp_path, monkeypatch):
  expected = all_params(converted(folder))
  monkeypatch.setattr(tensors, "SHARD_BYTES", shard_bytes)
  formats.convert(f"{folder}_workdir", str(tmp_path / "out"), "reference")
  index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
  files = list((tmp_path / "out").glob("*.safetensors"))
  assert len(files) == len(set(index["weight_map"].values())) > 1
  assert index["metadata"]["total_size"] == sum(
    x.nbytes for x in with_table_twice(weights(GOLDEN / "k4/energy")).values()
  )
  assert_same(all_params(converted(tmp_path / "out")), expected)


@pytest.mark.parametrize("name", ["autoencoder", "calm", "transformer"])
def test_what_goes_out_and_comes_back_scores_the_same(name, request, tokens, tmp_path):
  source = str(request.getfixturevalue(f"trained_{name}"))
  formats.convert(source, str(tmp_path / "out"), "reference")
  to_workdir.write(str(tmp_path / "out"), str(tmp_path / "back"))
  there, back = workdir.load(source), workdir.load(str(tmp_path / "back"))
  assert_same(all_params(there), all_params(back))
  store = store_lib.TokenStore.open(tokens)
  workdir.require_same_tokenizer(back.origin, store, "back")
  figures = []
  for trained in (there, back):
    trained = dataclasses.replace(
      trained,
      run=dataclasses.replace(trained.run, loss=there.run.loss) if name == "calm" else trained.run,
    )
    stage, _, _ = evaluation.stage_of(trained)
    figures.append(evaluation.Evaluator(stage, store, 32, 4, 8, 0)(trained.params))
  assert figures[0] == figures[1]


def test_imported_weights_write_text_from_a_prompt_of_a_patch(trained_calm, tmp_path):
  formats.convert(str(trained_calm), str(tmp_path / "out"), "reference")
  back = converted(tmp_path / "out")
  decoder = decode.Decoder(back, requests.Sampler(), print)
  writing = decoder.start([requests.Request(tuple(range(20, 24)), max_tokens=8)])
  assert len(writing.advance(2)[0].tokens) == 8 and writing.done
  with pytest.raises(errors.CalmError, match=r"prompt has 3 tokens.*at least a patch, 4 tokens"):
    decoder.start([requests.Request(tuple(range(3)))])


def test_formats_that_a_stage_has_not_are_named(trained_autoencoder, trained_transformer, tmp_path):
  for source, kind, reason in (
    (trained_autoencoder, "llama", "--format=llama is for transformer, but .*'autoencoder'"),
    (trained_transformer, "torch", "can be written as reference, llama"),
  ):
    with pytest.raises(errors.CalmError, match=reason):
      formats.convert(str(source), str(tmp_path / "out"), kind)


def test_the_card_tells_what_was_measured(trained_calm, tmp_path):
  source = tmp_path / "source"
  shutil.copytree(trained_calm, source)
  figures = {"brier_lm": 12.5, "brier_lm_stderr": 0.25, "context_tokens": 32, "data": "/secret"}
  (source / workdir.EVALUATION).write_text(json.dumps(figures))
  formats.convert(str(source), str(tmp_path / "out"), "reference")
  card = (tmp_path / "out/README.md").read_text()
  assert "| BrierLM | 12.50 ± 0.25 |" in card and "context in tokens 32" in card
  assert "/secret" not in card
  assert "Nothing yet" in (tmp_path / "out/autoencoder/README.md").read_text()


def test_the_wrong_way_is_told(trained_calm, tmp_path):
  for source, kind, reason in (
    (trained_calm, "workdir", "is a workdir already; it can be written as reference"),
    (
      GOLDEN / "k4/energy",
      "torch",
      "of another framework: convert it with --format=workdir first",
    ),
  ):
    with pytest.raises(errors.CalmError, match=reason):
      formats.convert(str(source), str(tmp_path / "out"), kind)


@pytest.mark.parametrize(("source", "output"), [("gs://b/a", "x"), ("{calm}", "gs://b/a")])
def test_buckets_are_refused(source, output, trained_calm, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  kind = "workdir" if output == "x" else "reference"
  with pytest.raises(errors.CalmError, match="gs://b/a is no local folder"):
    formats.convert(source.format(calm=trained_calm), output, kind)
  assert not list(tmp_path.iterdir())


def test_an_output_that_cant_be_written_is_told(trained_calm, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.CalmError, match="can't write --output="):
    formats.convert(str(trained_calm), str(tmp_path / "file/out"), "reference")


def test_a_source_named_like_a_half_written_output_survives(folder, tmp_path):
  source = tmp_path / "out.partial"
  folder.rename(source)
  to_workdir.write(str(source), str(tmp_path / "out"))
  assert source.exists() and (tmp_path / "out/config.json").exists()
