"""Claims about folders of others: however they hold weights they are read, and faults are named."""

import json
import pathlib
import shutil
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from folders import (
  GOLDEN,
  Weights,
  all_params,
  assert_same,
  converted,
  rewrite,
  set_config,
  weights,
)
from safetensors import numpy as safetensors

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


def split(held: Weights) -> tuple[Weights, Weights]:
  names = sorted(held)
  return {n: held[n] for n in names[::2]}, {n: held[n] for n in names[1::2]}


def sharded(folder: pathlib.Path) -> None:
  where = {}
  for number, shard in enumerate(split(weights(folder))):
    file = f"model-{number}.safetensors"
    safetensors.save_file(shard, folder / file)
    where |= dict.fromkeys(shard, file)
  (folder / "model.safetensors").unlink()
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


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


# What is wrong with a folder, and the line that tells.


def changed(apply: Callable[[Weights], object]) -> Callable[[pathlib.Path], None]:
  """Applies a function to the weights in place."""

  def change(folder: pathlib.Path) -> None:
    held = weights(folder)
    apply(held)
    rewrite(folder, held)

  return change


def truncate(folder: pathlib.Path) -> None:
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])


def outside(folder: pathlib.Path) -> None:
  sharded(folder)
  path = folder / "model.safetensors.index.json"
  path.write_text(path.read_text().replace("model-0", "../model-0"))


def misplaced(folder: pathlib.Path) -> None:
  sharded(folder)
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  index["weight_map"]["embed_proj.0.bias"] = "model-1.safetensors"
  index["weight_map"]["embed_proj.0.weight"] = "model-1.safetensors"
  path.write_text(json.dumps(index))


def gone(folder: pathlib.Path) -> None:
  sharded(folder)
  (folder / "model-1.safetensors").unlink()


def code_in_a_pickle(folder: pathlib.Path) -> None:
  pytest.importorskip("torch", reason="a .bin file takes torch to read")
  import pickle

  class Evil:
    def __reduce__(self):
      return print, ("this ran",)

  (folder / "model.safetensors").unlink()
  (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Evil()}))


def pickle_of(value: object) -> Callable[[pathlib.Path], None]:
  """Saves something else than tensors by name, or nothing at all."""

  def change(folder: pathlib.Path) -> None:
    torch = pytest.importorskip("torch", reason="a .bin file takes torch to read")
    (folder / "model.safetensors").unlink()
    if value is None:
      (folder / "pytorch_model.bin").write_bytes(b"")
    else:
      torch.save(value, folder / "pytorch_model.bin")

  return change


def no_weights(folder: pathlib.Path) -> None:
  (folder / "model.safetensors").unlink()


def config_of(**values) -> Callable[[pathlib.Path], None]:
  return lambda folder: set_config(folder, **values)


def other_autoencoder(held: Weights) -> None:
  held["ae_model.encoder.norm.weight"] = held["ae_model.encoder.norm.weight"] + 1


def copies_that_differ(held: Weights) -> None:
  table = held["ae_model.encoder.embed_tokens.weight"]
  held["ae_model.decoder.lm_head_weight"] = table + 1


def too_few_rows(folder: pathlib.Path) -> None:
  held = weights(folder)
  name = "transformer.embed_tokens.weight"
  rewrite(folder, held | {name: held[name][:-1]})
  set_config(folder, vocab_size=100)


def unknown_head(held: Weights) -> None:
  for name in [name for name in held if name.startswith("generative_head.")]:
    held[name.replace("generative_head", "mystery_head")] = held.pop(name)


BAD: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
  "missing": (changed(lambda w: w.pop("embed_proj.0.bias")), "lacks tensors: embed_proj.0.bias"),
  "extra": (
    changed(lambda w: w.update({"more.weight": np.ones(3, np.float32)})),
    "holds tensors that a model of its config.json has not: more.weight",
  ),
  "shape": (
    changed(lambda w: w.update({"embed_proj.0.bias": np.ones(3, np.float32)})),
    r"embed_proj.0.bias has shape \[3\], a model of its config.json has \[64\]",
  ),
  "integers": (
    changed(lambda w: w.update({"embed_proj.0.bias": np.ones(64, np.int32)})),
    "tensor embed_proj.0.bias has dtype I32",
  ),
  "unknown head": (changed(unknown_head), "holds no head that is known .* mystery_head"),
  "truncated": (truncate, "can't read .*model.safetensors.*is it cut short"),
  "index outside": (outside, r"names a file outside its folder: '../model-0.safetensors'"),
  "index wrong": (misplaced, "says that embed_proj.0.(bias|weight) is in model-1.safetensors"),
  "shard gone": (gone, "names model-1.safetensors, which is not there"),
  "pickle with code": (code_in_a_pickle, "pytorch_model.bin as plain weights.* is not done"),
  "pickle of a list": (pickle_of([1, 2]), "holds no tensors by name, but a list"),
  "pickle of numbers": (pickle_of({"a": 1}), "holds 'a', which is no tensor: int"),
  "empty pickle": (pickle_of(None), "pytorch_model.bin as plain weights; it is damaged"),
  "no weights": (no_weights, "no weights in .*neither model.safetensors nor pytorch_model.bin"),
  "width": (config_of(hidden_size=64), "has shape .*, a model of its config.json has"),
  "layers": (config_of(num_hidden_layers=3), "lacks tensors: transformer.layers.2"),
  "blocks": (config_of(num_mlp_layers=1), "has not: generative_head.mlp_blocks.1"),
  "K": (config_of(patch_size=2), "config.json says patch_size = 2, but its weights have 4"),
  "latent": (config_of(latent_size=8), "says latent_size = 8, but its weights have 16"),
  "vocabulary": (config_of(vocab_size=90), "says vocab_size = 90, but transformer.embed.* 101"),
  "epsilon": (config_of(rms_norm_eps=1e-5), "rms_norm_eps is 1e-05; only 1e-06 can be"),
  "scaled rotary": (config_of(rope_scaling={"type": "linear"}), "rope_scaling is"),
  "no number": (config_of(num_attention_heads="four"), "num_attention_heads must be a number"),
  "heads": (config_of(num_attention_heads=5), "width must be a multiple of 2 . heads = 10"),
  "half a head": (config_of(num_attention_heads=4.5), "num_attention_heads must be a whole number"),
  "one sample": (config_of(num_samples=1), r"samples \(N\) must be at least 2"),
  "rotary": (config_of(rope_theta="1e4"), "rope_theta must be a number above 0, got '1e4'"),
  "rotary type": (config_of(rope_parameters="x"), "rope_type is 'x'"),
  "few rows": (too_few_rows, "has 100 rows, too few for the 101 tokens"),
  "copies": (changed(copies_that_differ), "lm_head_weight and .*embed_tokens.* should be equal"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_folder_is_named_and_leaves_none(change, reason, folder, capfd):
  change(folder)
  before = sorted(folder.parent.iterdir())
  with pytest.raises(errors.CalmError, match=reason) as caught:
    converted(folder)
  assert str(folder) in str(caught.value)
  assert "\n" not in str(caught.value)
  assert sorted(folder.parent.iterdir()) == before
  assert "this ran" not in capfd.readouterr().out


def test_another_autoencoder_than_the_models_own_is_refused(folder):
  changed(other_autoencoder)(folder)
  with pytest.raises(errors.CalmError, match="leave out --autoencoder"):
    converted(folder, autoencoder=str(GOLDEN / "k4/autoencoder"))


def test_a_tokenizer_must_be_there_and_must_fit(folder, words):
  with pytest.raises(errors.CalmError, match="has 150 tokens, but the model's table has 101"):
    converted(folder, tokenizer=words(150))
  (folder / "tokenizer.json").unlink()
  with pytest.raises(errors.CalmError, match=r"holds no tokenizer .* give --tokenizer=FILE"):
    converted(folder)


@pytest.mark.parametrize("kind", ["mistral", "granite"])
def test_a_relative_of_llama_is_refused(kind: str, words, tmp_path):
  shutil.copytree(GOLDEN / "k4/ar", tmp_path / "ar")
  set_config(tmp_path / "ar", model_type=kind)
  with pytest.raises(errors.CalmError, match=f"a model of type '{kind}'"):
    converted(tmp_path / "ar", tokenizer=words(101))
