"""Claims about folders of other frameworks: all common layouts of weights are read."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
from folders import (
  GOLDEN,
  all_params,
  assert_same,
  converted,
  rewrite,
  set_config,
  sharded,
  split,
  weights,
)

from calm_jax import errors

# Layouts of real folders, given to the k4 energy model.


def without_autoencoder(folder: pathlib.Path) -> None:
  remaining = {name: x for name, x in weights(folder).items() if not name.startswith("ae_model.")}
  rewrite(folder, remaining)


def repeated_table(folder: pathlib.Path) -> None:
  loaded = weights(folder)
  table = loaded["ae_model.encoder.embed_tokens.weight"]
  rewrite(folder, loaded | {"ae_model.decoder.lm_head_weight": table})


def table_under_its_second_name(folder: pathlib.Path) -> None:
  loaded = weights(folder)
  table = loaded.pop("ae_model.encoder.embed_tokens.weight")
  rewrite(folder, loaded | {"ae_model.decoder.lm_head_weight": table})


def head_twice(folder: pathlib.Path) -> None:
  loaded = weights(folder)
  names = [name for name in loaded if "generative_head" in name]
  assert names
  head = {name.replace("generative_head", "mlp_generator"): loaded[name] for name in names}
  rewrite(folder, loaded | head)


def head_under_its_second_name(folder: pathlib.Path) -> None:
  renamed = {n.replace("generative_head", "mlp_generator"): x for n, x in weights(folder).items()}
  rewrite(folder, renamed)


def rotary_buffers(folder: pathlib.Path) -> None:
  buffer = np.ones(4, np.float32)
  names = ("transformer.rotary_emb.inv_freq", "transformer.layers.0.self_attn.rotary_emb.inv_freq")
  rewrite(folder, weights(folder) | dict.fromkeys(names, buffer))


def pickled(folder: pathlib.Path) -> None:
  torch = pytest.importorskip("torch", reason="a .bin file needs torch to write and to read")
  tensors = {name: torch.from_numpy(x) for name, x in weights(folder).items()}
  torch.save(tensors, folder / "pytorch_model.bin")
  (folder / "model.safetensors").unlink()


def pickled_and_sharded(folder: pathlib.Path) -> None:
  torch = pytest.importorskip("torch", reason="a .bin file needs torch to write and to read")
  file_of = {}
  for number, shard in enumerate(split(weights(folder))):
    file = f"pytorch_model-{number}.bin"
    torch.save({name: torch.from_numpy(x) for name, x in shard.items()}, folder / file)
    file_of |= dict.fromkeys(shard, file)
  (folder / "model.safetensors").unlink()
  (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": file_of}))


def pickled_in_the_old_format(folder: pathlib.Path) -> None:
  """The format before PyTorch 1.6, of parameters, which require gradients."""
  torch = pytest.importorskip("torch", reason="a .bin file needs torch to write and to read")
  parameters = {n: torch.nn.Parameter(torch.from_numpy(x)) for n, x in weights(folder).items()}
  torch.save(parameters, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
  (folder / "model.safetensors").unlink()


def autoencoder_nowhere(folder: pathlib.Path) -> None:
  set_config(folder, ae_path="x" * 5000)


@pytest.mark.parametrize(
  "change",
  [
    autoencoder_nowhere,
    pickled_in_the_old_format,
    repeated_table,
    table_under_its_second_name,
    head_twice,
    head_under_its_second_name,
    rotary_buffers,
    sharded,
    pickled,
    pickled_and_sharded,
  ],
)
def test_every_layout_gives_the_same_weights(change, folder):
  expected = all_params(converted(folder))
  shutil.rmtree(f"{folder}_workdir")
  change(folder)
  assert_same(all_params(converted(folder)), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_become_their_float32_values(dtype: str, folder):
  kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
  halves = {name: x.astype(kind) for name, x in weights(folder).items()}
  rewrite(folder, halves)
  kernel = converted(folder).params["backbone"]["input"]["up"]["kernel"]
  assert_same(np.asarray(kernel), halves["embed_proj.0.weight"].T.astype(np.float32))


def test_bfloat16_pickles_are_read(folder):
  torch = pytest.importorskip("torch", reason="a .bin file needs torch to write and to read")
  halves = {name: torch.from_numpy(x).bfloat16() for name, x in weights(folder).items()}
  torch.save(halves, folder / "pytorch_model.bin")
  (folder / "model.safetensors").unlink()
  kernel = converted(folder).params["backbone"]["input"]["up"]["kernel"]
  assert_same(np.asarray(kernel), halves["embed_proj.0.weight"].T.float().numpy())


def test_the_autoencoder_is_found_inside_or_by_its_path(folder, tmp_path):
  expected = converted(folder).parents["autoencoder"].params
  shutil.rmtree(f"{folder}_workdir")
  without_autoencoder(folder)
  with pytest.raises(errors.CalmError, match=r"'\.\./autoencoder' does not exist: give --autoenc"):
    converted(folder)
  assert_same(
    converted(folder, autoencoder=str(GOLDEN / "k4/autoencoder")).parents["autoencoder"].params,
    expected,
  )
  shutil.rmtree(f"{folder}_workdir")
  shutil.copytree(GOLDEN / "k4/autoencoder", tmp_path / "autoencoder")  # The place of ae_path.
  assert_same(converted(folder).parents["autoencoder"].params, expected)


def test_a_vocabulary_padded_by_one_is_kept(folder):
  loaded = weights(folder)
  name = "transformer.embed_tokens.weight"
  padded = np.concatenate([loaded[name], np.full((1, 32), 7, np.float32)])
  rewrite(folder, loaded | {name: padded})
  trained = converted(folder)
  assert (trained.origin.vocab_size, trained.parents["autoencoder"].origin.vocab_size) == (102, 101)
  assert_same(np.asarray(trained.params["backbone"]["embed"]["embedding"]), padded)


def test_a_tied_llama_gets_an_output_layer_of_its_own(tmp_path, words):
  shutil.copytree(GOLDEN / "k4/ar", tmp_path / "ar")
  loaded = weights(tmp_path / "ar")
  del loaded["lm_head.weight"]
  rewrite(tmp_path / "ar", loaded)
  set_config(tmp_path / "ar", tie_word_embeddings=True)
  params = converted(tmp_path / "ar", tokenizer=words(101)).params
  assert_same(params["out"]["kernel"], params["embed"]["embedding"].T)
