"""Claims about folders of others: however they hold weights they are read."""

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

# What real folders look like, and how the k4 energy model is made to look so.


def without_autoencoder(folder: pathlib.Path) -> None:
  kept = {name: x for name, x in weights(folder).items() if not name.startswith("ae_model.")}
  rewrite(folder, kept)


def repeated_table(folder: pathlib.Path) -> None:
  held = weights(folder)
  table = held["ae_model.encoder.embed_tokens.weight"]
  rewrite(folder, held | {"ae_model.decoder.lm_head_weight": table})


def table_under_its_other_name(folder: pathlib.Path) -> None:
  held = weights(folder)
  table = held.pop("ae_model.encoder.embed_tokens.weight")
  rewrite(folder, held | {"ae_model.decoder.lm_head_weight": table})


def head_twice(folder: pathlib.Path) -> None:
  held = weights(folder)
  head = {n.replace("generative_head", "mlp_generator"): x for n, x in held.items() if "gener" in n}
  assert head
  rewrite(folder, held | head)


def head_under_its_other_name(folder: pathlib.Path) -> None:
  renamed = {n.replace("generative_head", "mlp_generator"): x for n, x in weights(folder).items()}
  rewrite(folder, renamed)


def rotary_buffers(folder: pathlib.Path) -> None:
  buffer = np.ones(4, np.float32)
  names = ("transformer.rotary_emb.inv_freq", "transformer.layers.0.self_attn.rotary_emb.inv_freq")
  rewrite(folder, weights(folder) | dict.fromkeys(names, buffer))


def pickled(folder: pathlib.Path) -> None:
  torch = pytest.importorskip("torch", reason="a .bin file takes torch to write and to read")
  held = {name: torch.from_numpy(x) for name, x in weights(folder).items()}
  torch.save(held, folder / "pytorch_model.bin")
  (folder / "model.safetensors").unlink()


def pickled_and_sharded(folder: pathlib.Path) -> None:
  torch = pytest.importorskip("torch", reason="a .bin file takes torch to write and to read")
  where = {}
  for number, shard in enumerate(split(weights(folder))):
    file = f"pytorch_model-{number}.bin"
    torch.save({name: torch.from_numpy(x) for name, x in shard.items()}, folder / file)
    where |= dict.fromkeys(shard, file)
  (folder / "model.safetensors").unlink()
  (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


def pickled_as_of_old(folder: pathlib.Path) -> None:
  """Before PyTorch 1.6, and of parameters, which still have gradients."""
  torch = pytest.importorskip("torch", reason="a .bin file takes torch to write and to read")
  held = {name: torch.nn.Parameter(torch.from_numpy(x)) for name, x in weights(folder).items()}
  torch.save(held, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
  (folder / "model.safetensors").unlink()


def autoencoder_nowhere(folder: pathlib.Path) -> None:
  set_config(folder, ae_path="x" * 5000)


@pytest.mark.parametrize(
  "change",
  [
    autoencoder_nowhere,
    pickled_as_of_old,
    repeated_table,
    table_under_its_other_name,
    head_twice,
    head_under_its_other_name,
    rotary_buffers,
    sharded,
    pickled,
    pickled_and_sharded,
  ],
)
def test_however_a_folder_holds_them_the_weights_are_the_same(change, folder):
  expected = all_params(converted(folder))
  shutil.rmtree(f"{folder}_workdir")
  change(folder)
  assert_same(all_params(converted(folder)), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_become_their_float32_values(dtype: str, folder):
  kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
  held = {name: x.astype(kind) for name, x in weights(folder).items()}
  rewrite(folder, held)
  found = converted(folder).params["backbone"]["input"]["up"]["kernel"]
  assert_same(np.asarray(found), held["embed_proj.0.weight"].T.astype(np.float32))


def test_bfloat16_pickles_are_read(folder):
  torch = pytest.importorskip("torch", reason="a .bin file takes torch to write and to read")
  held = {name: torch.from_numpy(x).bfloat16() for name, x in weights(folder).items()}
  torch.save(held, folder / "pytorch_model.bin")
  (folder / "model.safetensors").unlink()
  found = converted(folder).params["backbone"]["input"]["up"]["kernel"]
  assert_same(np.asarray(found), held["embed_proj.0.weight"].T.float().numpy())


def test_the_autoencoder_is_found_inside_or_where_it_is_said_to_be(folder, tmp_path):
  expected = converted(folder).autoencoder.params
  shutil.rmtree(f"{folder}_workdir")
  without_autoencoder(folder)
  with pytest.raises(errors.CalmError, match=r"'\.\./autoencoder' leads nowhere: give --autoenc"):
    converted(folder)
  assert_same(
    converted(folder, autoencoder=str(GOLDEN / "k4/autoencoder")).autoencoder.params,
    expected,
  )
  shutil.rmtree(f"{folder}_workdir")
  shutil.copytree(GOLDEN / "k4/autoencoder", tmp_path / "autoencoder")  # ae_path leads here.
  assert_same(converted(folder).autoencoder.params, expected)


def test_a_vocabulary_padded_by_one_is_kept(folder):
  held = weights(folder)
  name = "transformer.embed_tokens.weight"
  padded = np.concatenate([held[name], np.full((1, 32), 7, np.float32)])
  rewrite(folder, held | {name: padded})
  trained = converted(folder)
  assert (trained.origin.vocab_size, trained.autoencoder.origin.vocab_size) == (102, 101)
  assert_same(np.asarray(trained.params["backbone"]["embed"]["embedding"]), padded)


def test_a_tied_llama_gets_an_output_layer_of_its_own(tmp_path, words):
  shutil.copytree(GOLDEN / "k4/ar", tmp_path / "ar")
  held = weights(tmp_path / "ar")
  del held["lm_head.weight"]
  rewrite(tmp_path / "ar", held)
  set_config(tmp_path / "ar", tie_word_embeddings=True)
  params = converted(tmp_path / "ar", tokenizer=words(101)).params
  assert_same(params["out"]["kernel"], params["embed"]["embedding"].T)
