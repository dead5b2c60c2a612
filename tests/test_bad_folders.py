"""Claims about damaged or wrong folders of other frameworks: one line names the first fault."""

import json
import os
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest
from folders import (
  GOLDEN,
  Weights,
  converted,
  rewrite,
  set_config,
  sharded,
  weights,
  with_table_twice,
)
from safetensors import numpy as safetensors

from calm_jax import errors
from calm_jax.interchange import tensors
from calm_jax.running import conversion


def changed(apply: Callable[[Weights], object]) -> Callable[[pathlib.Path], None]:
  """Returns a function that changes the weights of a folder in place by `apply`."""

  def change(folder: pathlib.Path) -> None:
    loaded = weights(folder)
    apply(loaded)
    rewrite(folder, loaded)

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


def ghost(folder: pathlib.Path) -> None:
  sharded(folder)
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  index["weight_map"]["more"] = "model-1.safetensors"
  path.write_text(json.dumps(index))


def missing_shard(folder: pathlib.Path) -> None:
  sharded(folder)
  (folder / "model-1.safetensors").unlink()


def code_in_a_pickle(folder: pathlib.Path) -> None:
  pytest.importorskip("torch", reason="a .bin file needs torch to read")
  import pickle

  class Evil:
    def __reduce__(self):
      return print, ("this ran",)

  (folder / "model.safetensors").unlink()
  (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Evil()}))


def pickle_of(value: object) -> Callable[[pathlib.Path], None]:
  """Returns a function that pickles a value in place of the weights; None leaves an empty file."""

  def change(folder: pathlib.Path) -> None:
    torch = pytest.importorskip("torch", reason="a .bin file needs torch to read")
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


def other_autoencoder(loaded: Weights) -> None:
  loaded["ae_model.encoder.norm.weight"] = loaded["ae_model.encoder.norm.weight"] + 1


def copies_that_differ(loaded: Weights) -> None:
  table = loaded["ae_model.encoder.embed_tokens.weight"]
  loaded["ae_model.decoder.lm_head_weight"] = table + 1


def too_few_rows(folder: pathlib.Path) -> None:
  loaded = weights(folder)
  name = "transformer.embed_tokens.weight"
  rewrite(folder, loaded | {name: loaded[name][:-1]})
  set_config(folder, vocab_size=100)


def unknown_head(loaded: Weights) -> None:
  for name in [name for name in loaded if name.startswith("generative_head.")]:
    loaded[name.replace("generative_head", "mystery_head")] = loaded.pop(name)


def config_text(text: str) -> Callable[[pathlib.Path], None]:
  def change(folder: pathlib.Path) -> None:
    (folder / "config.json").write_text(text)

  return change


def index_of(text: str) -> Callable[[pathlib.Path], None]:
  """Returns a function that replaces the weights by shards with an index of this text."""

  def change(folder: pathlib.Path) -> None:
    sharded(folder)
    (folder / "model.safetensors.index.json").write_text(text)

  return change


def in_both(folder: pathlib.Path) -> None:
  """Writes a tensor to both shards."""
  sharded(folder)
  first = folder / "model-0.safetensors"
  second = safetensors.load_file(folder / "model-1.safetensors")
  safetensors.save_file(safetensors.load_file(first) | dict(list(second.items())[:1]), first)


def pipe(name: str) -> Callable[[pathlib.Path], None]:
  def change(folder: pathlib.Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)

  return change


def device(name: str) -> Callable[[pathlib.Path], None]:
  """Returns a function that replaces a file by one without an end."""

  def change(folder: pathlib.Path) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")

  return change


def pipe_for_a_shard(folder: pathlib.Path) -> None:
  sharded(folder)
  pipe("model-1.safetensors")(folder)


def folder_for_weights(folder: pathlib.Path) -> None:
  (folder / "model.safetensors").unlink()
  (folder / "model.safetensors").mkdir()


def empty_table(loaded: Weights) -> None:
  loaded["ae_model.encoder.embed_tokens.weight"] = np.zeros((101, 0), np.float32)


def far_layer(loaded: Weights) -> None:
  """Gives a layer so high a number that building all layers below it would never end."""
  for name in [name for name in loaded if ".encoder_layers.1." in name]:
    loaded[name.replace(".1.", f".{10**12}.")] = loaded.pop(name)


def entry_of(name: str, value: float) -> Callable[[Weights], None]:
  def change(loaded: Weights) -> None:
    loaded[name] = loaded[name].copy()
    loaded[name].flat[3] = value

  return change


NESTED = "[" * 100_000
BAD: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
  "missing": (changed(lambda w: w.pop("embed_proj.0.bias")), "lacks tensors: embed_proj.0.bias"),
  "extra": (
    changed(lambda w: w.update({"more.weight": np.ones(3, np.float32)})),
    "holds tensors that a model of its config.json does not have: more.weight",
  ),
  "shape": (
    changed(lambda w: w.update({"embed_proj.0.bias": np.ones(3, np.float32)})),
    r"embed_proj.0.bias has shape \[3\], but a model of its config.json has \[64\]",
  ),
  "integers": (
    changed(lambda w: w.update({"embed_proj.0.bias": np.ones(64, np.int32)})),
    "tensor embed_proj.0.bias has dtype I32",
  ),
  "unknown head": (changed(unknown_head), "holds no known head .* mystery_head"),
  "truncated": (truncate, "can't read .*model.safetensors.*is it truncated"),
  "index outside": (outside, r"names a file outside its folder: '../model-0.safetensors'"),
  "index wrong": (misplaced, "holds 'embed_proj.0.(bias|weight)', which .* does not assign to it"),
  "index of more": (ghost, "says that 'more' is in 'model-1.safetensors', which has no such ten"),
  "shard gone": (missing_shard, "names 'model-1.safetensors', which does not exist"),
  "pickle with code": (code_in_a_pickle, "pytorch_model.bin as plain weights.* is not executed"),
  "pickle of a list": (pickle_of([1, 2]), "holds no tensors by name, but a list"),
  "pickle of numbers": (pickle_of({"a": 1}), "holds 'a', which is not a tensor: int"),
  "empty pickle": (pickle_of(None), "pytorch_model.bin as plain weights; it is damaged"),
  "no weights": (no_weights, "no weights in .*neither model.safetensors nor pytorch_model.bin"),
  "width": (config_of(hidden_size=64), "says hidden_size = 64, but its weights have 32"),
  "layers": (config_of(num_hidden_layers=3), "says num_hidden_layers = 3, but its weights have 2"),
  "blocks": (config_of(num_mlp_layers=1), "says num_mlp_layers = 1, but its weights have 2"),
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
  "config too deep": (
    config_text('{"a": ' + NESTED),
    "config.json is not valid JSON: nested too d",
  ),
  "config a list": (config_text("[]"), "config.json must hold a JSON object, got list"),
  "config no text": (config_text("\x00\x01"), "config.json is not valid JSON"),
  "config a pipe": (pipe("config.json"), "config.json is a pipe, a device or a socket"),
  "config a device": (device("config.json"), "config.json is a pipe, a device or a socket"),
  "long list": (config_of(rope_parameters=[1] * 999), r"rope_type is \[1, 1.*\.\.\.\]; only"),
  "list for a number": (config_of(num_attention_heads=[4]), "must be a number above 0, got .4."),
  "list for a size": (config_of(vocab_size=[]), "vocab_size must be a number above 0"),
  "index too deep": (index_of(NESTED), "index.json is not valid JSON: nested too deep"),
  "index a list": (index_of("[1]"), "index.json must hold a JSON object, got list"),
  "map a list": (index_of('{"weight_map": ["a"]}'), "has no weight_map from tensors to files"),
  "map of lists": (index_of('{"weight_map": {"a": ["b"]}}'), "has no weight_map from tensors to"),
  "shard of no name": (index_of('{"weight_map": {"a": "b\\nc"}}'), r"names 'b\\nc', which does n"),
  "twice": (in_both, "model-0.safetensors holds '.*', which .* does not assign to it"),
  "weights a pipe": (pipe("model.safetensors"), "safetensors is a pipe, a device or a socket"),
  "weights a device": (device("model.safetensors"), "safetensors is a pipe, a device or a socket"),
  "weights a folder": (folder_for_weights, "model.safetensors is a folder, not a file"),
  "shard a pipe": (pipe_for_a_shard, "model-1.safetensors is a pipe, a device or a socket"),
  "tokenizer a pipe": (pipe("tokenizer.json"), "tokenizer.json is a pipe, a device or a socket"),
  "no width": (changed(empty_table), r"embed_tokens.weight is empty: its shape is \[101, 0\]"),
  "odd name": (changed(lambda w: w.update({"a\nb": np.ones(1)})), r"a tensor is called 'a\\nb'"),
  "far layer": (changed(far_layer), r"lacks tensors: ae_model.encoder.encoder_layers.1\.\*"),
  "10^6 layers": (config_of(num_hidden_layers=10**6), "num_hidden_layers = 1000000, but its weig"),
  "10^6 blocks": (config_of(num_mlp_layers=10**6), "num_mlp_layers = 1000000, but its weights"),
  "big width": (config_of(hidden_size=2**31), "hidden_size = 2147483648, but its weights have 32"),
  "big inside": (config_of(intermediate_size=2**62), "intermediate_size = .*, but its weights"),
  "big noise": (config_of(noise_size=2**31), "noise_size = 2147483648, but its weights have 8"),
  "big vocabulary": (config_of(vocab_size=2**31), "vocab_size must be below 2.31, got 2147483648"),
  "big K": (config_of(patch_size=2**31), "patch_size = 2147483648, but its weights have 4"),
  "many heads": (config_of(num_attention_heads=2**31), "num_attention_heads must be below 2.31"),
  "more heads": (config_of(num_attention_heads=2**30), r"heads must lie in \[1, 1048576\], got"),
  "many groups": (config_of(num_key_value_heads=2**31), "num_key_value_heads must be below 2.31"),
  "many samples": (config_of(num_samples=2**31), "num_samples must be below 2.31"),
  "long context": (config_of(max_position_embeddings=2**30), "and below 536870912; got 1073741824"),
  "one position": (config_of(max_position_embeddings=1), "must be at least 2, .* got 1"),
  "huge number": (config_of(num_attention_heads=10**4000), r"must be below 2.31, got 10+\.\.\.0+"),
  "huge base": (config_of(rope_theta=10**400), r"rope_theta must be below 2.31, got 10+\.\.\.0+"),
  "infinite base": (config_of(rope_theta=float("inf")), "rope_theta must be a number .* got inf"),
  "no base": (config_of(rope_theta=float("nan")), "rope_theta must be a number above 0, got nan"),
  "EOS outside": (config_of(eos_token_id=101), "eos_token_id = 101, but .* has 101 tokens: set"),
  "EOS below 0": (config_of(eos_token_id=[-1]), "eos_token_id = -1, but .* has 101 tokens"),
  "huge EOS": (config_of(eos_token_id=2**70), "eos_token_id = 1180591620717411303424, but"),
  "NaN": (
    changed(entry_of("embed_proj.0.bias", np.nan)),
    "1 of the 64 values of tensor embed_proj.0.bias are NaN or infinite; --allow_nonfinite",
  ),
  "infinite": (
    changed(entry_of("ae_model.encoder.norm.weight", -np.inf)),
    "values of tensor ae_model.encoder.norm.weight are NaN or infinite",
  ),
  "copies": (changed(copies_that_differ), "lm_head_weight and .*embed_tokens.* should be equal"),
}


@pytest.mark.parametrize(("change", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_folder_is_named_and_no_workdir_is_left(change, reason, folder, capfd):
  change(folder)
  before = sorted(folder.parent.iterdir())
  with pytest.raises(errors.CalmError, match=reason) as caught:
    converted(folder)
  assert str(folder) in str(caught.value)
  assert "\n" not in str(caught.value)
  assert sorted(folder.parent.iterdir()) == before
  assert "this ran" not in capfd.readouterr().out


def test_non_finite_weights_are_accepted_on_request(folder):
  changed(entry_of("embed_proj.0.bias", np.nan))(folder)
  changed(lambda w: w.update(with_table_twice(w)))(folder)
  changed(entry_of("ae_model.encoder.embed_tokens.weight", np.inf))(folder)
  changed(entry_of("ae_model.decoder.lm_head_weight", np.inf))(folder)
  trained = converted(folder, allow_nonfinite=True)
  bias = np.asarray(trained.params["backbone"]["input"]["up"]["bias"])
  np.testing.assert_array_equal(np.isnan(bias), np.arange(64) == 3)


@pytest.mark.parametrize("head", ["flow", "diffusion"])
def test_the_sampling_steps_of_a_head_are_limited(head: str, words, tmp_path):
  shutil.copytree(GOLDEN / f"k4/{head}", tmp_path / head)
  set_config(tmp_path / head, sampling_steps=2**31)
  with pytest.raises(errors.CalmError, match=r"sampling_steps must be below 2.31"):
    converted(tmp_path / head, tokenizer=words(101))


@pytest.mark.parametrize("position", [1, 2**31])
def test_a_llamas_positions_must_be_a_context(position: int, words, tmp_path):
  shutil.copytree(GOLDEN / "k4/ar", tmp_path / "ar")
  set_config(tmp_path / "ar", max_position_embeddings=position)
  with pytest.raises(errors.CalmError, match=r"max_position_embeddings must be .*below|below 2.31"):
    converted(tmp_path / "ar", tokenizer=words(101))


def test_an_eos_outside_the_tokenizers_vocabulary_is_refused(folder):
  """The tokenizer's own EOS has no well-known name, so that of config.json would be used."""
  text = (folder / "tokenizer.json").read_text().replace("</s>", "<fin>")
  (folder / "tokenizer.json").write_text(text)
  for eos in (101, 2**70, -1):
    set_config(folder, eos_token_id=eos)
    with pytest.raises(
      errors.CalmError, match=rf"has no token {eos} to end .* its vocabulary has 101"
    ):
      converted(folder)


def test_missing_permission_is_reported(folder, tmp_path, monkeypatch):
  """For example in a folder of another user."""
  denied = PermissionError(13, "Permission denied", "config.json")

  def refuse(path, *args, **more):
    raise denied

  with monkeypatch.context() as patch:
    patch.setattr(tensors, "open_folder", refuse)
    with pytest.raises(errors.CalmError, match=r"can't read .*energy: .*Permission denied"):
      converted(folder)
  look = os.stat

  def refuse_config(path, *args, **more):
    return refuse(path) if str(path).endswith("config.json") else look(path, *args, **more)

  monkeypatch.setattr(os, "stat", refuse_config)
  with pytest.raises(errors.CalmError, match=r"can't reach .*config.json: .*Permission denied"):
    conversion.convert(str(folder), str(tmp_path / "out"), "workdir")


def test_another_autoencoder_than_the_models_own_is_refused(folder):
  changed(other_autoencoder)(folder)
  with pytest.raises(errors.CalmError, match="leave out --autoencoder"):
    converted(folder, autoencoder=str(GOLDEN / "k4/autoencoder"))


def test_a_tokenizer_is_required_and_must_fit(folder, words):
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
