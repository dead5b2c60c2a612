"""Claims about weights in and out: nothing is lost on the way, and what is wrong is named."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

from calm_jax import errors, main, workdir
from calm_jax.data import store as store_lib
from calm_jax.generation import decode
from calm_jax.interchange import formats, tensors, to_workdir
from calm_jax.training import evaluation

GOLDEN = pathlib.Path(__file__).parent / "testdata/golden"
VOCAB = {"k4": 101, "k2_gqa": 97}
MODELS = ("autoencoder", "energy", "flow", "diffusion", "ar")

Weights = dict[str, np.ndarray]


@pytest.fixture
def folder(tmp_path: pathlib.Path, words) -> pathlib.Path:
  """A copy of the k4 energy model's folder, to be changed, with a tokenizer in it."""
  copy = tmp_path / "energy"
  shutil.copytree(GOLDEN / "k4/energy", copy)
  shutil.copyfile(words(VOCAB["k4"]), copy / "tokenizer.json")
  return copy


def weights(folder: pathlib.Path) -> Weights:
  return safetensors.load_file(folder / "model.safetensors")


def rewrite(folder: pathlib.Path, changed: Weights) -> None:
  safetensors.save_file(changed, folder / "model.safetensors")


def set_config(folder: pathlib.Path, **values) -> None:
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


def converted(folder: pathlib.Path, **options) -> workdir.Trained:
  """The workdir that a folder becomes."""
  output = folder.parent / f"{folder.name}_workdir"
  to_workdir.write(str(folder), str(output), **options)
  return workdir.load(str(output))


def all_params(trained: workdir.Trained):
  inner = trained.autoencoder.params if isinstance(trained, workdir.TrainedCalm) else {}
  return trained.params, inner


def assert_same(a, b) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", VOCAB)
def test_in_and_out_and_in_again_is_the_same_to_the_bit(case, model, words, tmp_path):
  source, output = GOLDEN / case / model, tmp_path / "in"
  to_workdir.write(str(source), str(output), tokenizer=words(VOCAB[case]))
  formats.convert(str(output), str(tmp_path / "out"), "reference")
  assert_same(weights(tmp_path / "out"), weights(source))
  to_workdir.write(str(tmp_path / "out"), str(tmp_path / "again"))
  first, second = workdir.load(str(output)), workdir.load(str(tmp_path / "again"))
  assert_same(all_params(first), all_params(second))
  assert (first.run, first.origin) == (second.run, second.origin)


def test_a_language_models_folder_holds_its_autoencoders(folder, tmp_path):
  source = converted(folder)
  formats.convert(str(tmp_path / "energy_workdir"), str(tmp_path / "out"), "reference")
  inner = tmp_path / "out/autoencoder"
  assert json.loads((tmp_path / "out/config.json").read_text())["ae_path"] == str(inner)
  assert_same(converted(inner).params, source.autoencoder.params)


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
    converted(folder, autoencoder=str(GOLDEN / "k4/autoencoder")).autoencoder.params, expected
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


def changed(**given: Callable[[Weights], object]) -> Callable[[pathlib.Path], None]:
  """Applies a function to the weights in place."""
  (apply,) = given.values()

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
  "missing": (changed(_=lambda w: w.pop("embed_proj.0.bias")), "lacks tensors: embed_proj.0.bias"),
  "extra": (
    changed(_=lambda w: w.update({"more.weight": np.ones(3, np.float32)})),
    "holds tensors that a model of its config.json has not: more.weight",
  ),
  "shape": (
    changed(_=lambda w: w.update({"embed_proj.0.bias": np.ones(3, np.float32)})),
    r"embed_proj.0.bias has shape \[3\], a model of its config.json has \[64\]",
  ),
  "integers": (
    changed(_=lambda w: w.update({"embed_proj.0.bias": np.ones(64, np.int32)})),
    "tensor embed_proj.0.bias has dtype I32",
  ),
  "unknown head": (changed(_=unknown_head), "holds no head that is known .* mystery_head"),
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
  "copies": (changed(_=copies_that_differ), "lm_head_weight and .*embed_tokens.* should be equal"),
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
  changed(_=other_autoencoder)(folder)
  with pytest.raises(errors.CalmError, match="leave out --autoencoder"):
    converted(folder, autoencoder=str(GOLDEN / "k4/autoencoder"))


def test_a_tokenizer_must_be_there_and_must_fit(folder, words):
  with pytest.raises(errors.CalmError, match="has 150 tokens, but the model's table has 101"):
    converted(folder, tokenizer=words(150))
  (folder / "tokenizer.json").unlink()
  with pytest.raises(errors.CalmError, match=r"holds no tokenizer .* give --tokenizer=FILE"):
    converted(folder)


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
    x.nbytes for x in weights(GOLDEN / "k4/energy").values()
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
  decoder = decode.Decoder(back, decode.Settings(max_tokens=8), print)
  new = [token for patch in decoder.tokens(range(20, 24), jax.random.key(0)) for token in patch]
  assert len(new) == 8
  with pytest.raises(errors.CalmError, match=r"prompt has 3 tokens.*at least a patch, 4 tokens"):
    list(decoder.tokens(range(3), jax.random.key(0)))


@pytest.mark.parametrize("name", ["autoencoder", "calm", "transformer"])
def test_training_starts_from_imported_weights(name, request, tmp_path):
  source = request.getfixturevalue(f"trained_{name}")
  run = request.getfixturevalue(f"{name}_run")
  formats.convert(str(source), str(tmp_path / "out"), "reference")
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
  main.train_run(run, str(tmp_path / "new"))
  found = workdir.load(str(tmp_path / "new"))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    all_params(found),
    all_params(imported),
  )
  with pytest.raises(errors.CalmError, match=f"new --workdir with --config.start_from={start}"):
    main.train_run(run, start)


def test_weights_of_another_size_are_no_start(trained_calm, calm_run, tmp_path):
  wider = dataclasses.replace(
    calm_run,
    autoencoder="",
    start_from=str(trained_calm),
    model=dataclasses.replace(calm_run.model, ffn=64),
  )
  with pytest.raises(errors.CalmError, match=r"of another size: give --config.model.ffn=32"):
    main.train_run(wider, str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


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


COMPARE = """
import sys
import numpy as np
tokens = np.load("tokens.npy")
noise = np.load("noise.npy")
{code}
found = dict(mean=mean, log_std=log_std, logits=logits)
if "candidates" in dir():
  found |= dict(candidates=candidates, latents=latents)
  for tokens in np.load("more.npy"):
    candidates, latents, state = next_patch(weights, state, tokens, noise)
  found |= dict(last=latents)
np.savez("found.npz", **found)
assert not [name for name in sys.modules if name.startswith("calm_jax")]
"""


@pytest.mark.parametrize("model", ["autoencoder", "energy", "flow", "diffusion"])
def test_compiled_artefacts_do_as_we_do_without_us(model, words, tmp_path):
  """Runs the code of the folder's own card, at a batch of 3 and 2 candidates."""
  shutil.copytree(GOLDEN / "k4" / model, tmp_path / "source")
  set_config(tmp_path / "source", max_position_embeddings=4)  # The model sees 3 patches.
  to_workdir.write(str(tmp_path / "source"), str(tmp_path / "in"), tokenizer=words(101))
  formats.convert(str(tmp_path / "in"), str(tmp_path / "out"), "stablehlo")
  trained = workdir.load(str(tmp_path / "in"))
  rng = np.random.default_rng(0)
  token_BK = rng.integers(0, 101, (3, 4)).astype(np.int32)
  noise = np.zeros(())
  if isinstance(trained, workdir.TrainedCalm):
    noise = np.asarray(trained.model.head.draw_noise(jax.random.key(1), (2, 3)))
  np.save(tmp_path / "tokens.npy", token_BK)
  np.save(tmp_path / "noise.npy", noise)
  more_PBK = rng.integers(0, 101, (6, 3, 4)).astype(np.int32)
  np.save(tmp_path / "more.npy", more_PBK)
  code = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
  script = COMPARE.format(code=code.replace("FOLDER", str(tmp_path / "out")))
  subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)
  found = np.load(tmp_path / "found.npz")

  codec = trained.autoencoder if isinstance(trained, workdir.TrainedCalm) else trained
  module = codec.module("float32")
  mean, log_std = module.apply({"params": codec.params}, token_BK, method="encode")
  np.testing.assert_allclose(found["mean"], mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found["log_std"], log_std, rtol=1e-5, atol=1e-6)
  logits = module.apply({"params": codec.params}, mean, method="decode")
  np.testing.assert_allclose(found["logits"], logits, rtol=1e-5, atol=1e-5)
  if isinstance(trained, workdir.TrainedCalm):
    hidden_B1D, _ = trained.model.hidden(trained.params, token_BK[:, None])
    sample_NBZ = trained.model.samples(trained.params, hidden_B1D[:, 0], noise)
    np.testing.assert_allclose(found["latents"], sample_NBZ, rtol=1e-4, atol=1e-5)
    assert found["candidates"].shape == (2, 3, 4)
    cache = trained.model.empty_cache(3, 3)
    for patch_BK in (token_BK, *more_PBK):
      hidden_B1D, cache = trained.model.hidden(trained.params, patch_BK[:, None], None, cache)
    sample_NBZ = trained.model.samples(trained.params, hidden_B1D[:, 0], noise)
    np.testing.assert_allclose(found["last"], sample_NBZ, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mistral", "granite"])
def test_a_relative_of_llama_is_refused(kind: str, words, tmp_path):
  shutil.copytree(GOLDEN / "k4/ar", tmp_path / "ar")
  set_config(tmp_path / "ar", model_type=kind)
  with pytest.raises(errors.CalmError, match=f"a model of type '{kind}'"):
    converted(tmp_path / "ar", tokenizer=words(101))


def test_the_wrong_way_is_told(trained_calm, tmp_path):
  for source, kind, reason in (
    (trained_calm, "workdir", "is a workdir already; it can be written as reference"),
    (GOLDEN / "k4/energy", "torch", "of another framework: convert it with --format=workdir first"),
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


def test_padded_ids_decode_to_nothing(trained_transformer):
  origin = workdir.read_origin(str(trained_transformer))
  tokenizer = workdir.tokenizer(str(trained_transformer), origin)
  assert tokenizer.decode([20, tokenizer.vocab_size, 21]) == tokenizer.decode([20, 21])


def test_a_run_cut_before_its_first_checkpoint_still_starts_from_the_weights(
  trained_transformer, transformer_run, tmp_path, monkeypatch
):
  run = dataclasses.replace(
    transformer_run,
    start_from=str(trained_transformer),
    optimizer=dataclasses.replace(transformer_run.optimizer, learning_rate=1e-9),
    training=dataclasses.replace(transformer_run.training, steps=2),
  )

  def cut(self):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(main.train.Trainer, "train", cut)
    with pytest.raises(KeyboardInterrupt):
      main.train_run(run, str(tmp_path / "new"))
  assert workdir.exists(str(tmp_path / "new"))
  main.train_run(run, str(tmp_path / "new"))
  found, expected = (
    workdir.load(str(path)).params for path in (tmp_path / "new", trained_transformer)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
