"""Eight CPU devices, no accelerator; a shape mismatch that broadcasting would hide is an error.

The fixtures run the pipeline at toy size once per session: a store, and every stage trained on it.
Tests that change a folder use a copy.
"""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little, so the compiler should be fast. XLA's newer emitters of
# fused operations, which users have, make it half as slow again.
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
  " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
  " --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # Tests run in parallel.
# Many tests compile the same steps: they, and the commands that they run, share a cache.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="calm_jax_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import atexit
import dataclasses
import gc
import json
import pathlib
import shutil
import signal
from collections.abc import Callable, Iterator

import folders
import jax
import pytest
import tokenizers as tokenizers_lib
from etils import epath

from calm_jax import config, prepare
from calm_jax.models import calm
from calm_jax.models.heads import head as head_lib
from calm_jax.models.heads import tempered
from calm_jax.running import loading, train
from calm_jax.stages import autoencoder as autoencoder_stage
from calm_jax.stages import calm as calm_stage
from calm_jax.stages import tempered as tempered_stage
from calm_jax.stages import transformer as transformer_stage
from calm_jax.training import fingerprint
from calm_jax.training import trained as trained_lib

atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Background jobs, cron and some CI systems ignore SIGINT; processes that tests start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

OPTIMIZER = config.Optimizer(learning_rate=3e-3, warmup_steps=2, schedule="cosine")
ONE_DEVICE = config.Mesh(fsdp=1)
TRAINING = config.Training(
  steps=6,
  batch=8,
  compute_dtype="float32",
  log_every=1,
  eval_every=3,
  eval_blocks=6,
  checkpoint_every=2,
)


@pytest.fixture(scope="module", autouse=True)
def no_programs_left() -> Iterator[None]:
  """Frees the compiled programs after each file; all of them together need more than 5 GB."""
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
  """The path of a token store of 300 pieces."""
  folder = tmp_path_factory.mktemp("corpus")
  lines = [
    json.dumps({"text": f"The {i} cats of number {i % 17} said: {'meow, ' * (i % 5)}then ate."})
    for i in range(400)
  ]
  (folder / "cats.jsonl").write_text("\n".join(lines))
  settings = prepare.Settings(
    (f"{folder}/cats.jsonl",), f"{folder}/tokens", "train:300", heldout=0.2, workers=1
  )
  return prepare.prepare(settings).path


@pytest.fixture(scope="session")
def autoencoder_run(tokens: str) -> autoencoder_stage.Run:
  return autoencoder_stage.Run(
    data=config.Data(tokens, 32),
    model=config.Autoencoder(width=16, ffn=32, latent=8, init="fan_in"),
    optimizer=OPTIMIZER,
    training=TRAINING,
    mesh=ONE_DEVICE,
  )


@pytest.fixture(scope="session")
def trained_autoencoder(
  autoencoder_run: autoencoder_stage.Run, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """The workdir of a finished run of stage one."""
  workdir = tmp_path_factory.mktemp("autoencoder") / "run"
  train.train_run(autoencoder_run, str(workdir))
  return workdir


@pytest.fixture(scope="session")
def calm_run(tokens: str, trained_autoencoder: pathlib.Path) -> calm_stage.Run:
  return calm_stage.Run(
    data=config.Data(tokens, 32),
    autoencoder=str(trained_autoencoder),
    model=config.Backbone(layers=2, width=16, ffn=32, heads=2, kv_heads=1, init="fan_in"),
    head=config.Head(blocks=1, noise=4),
    loss=config.CalmLoss(samples=4, posterior_draws=3),
    optimizer=OPTIMIZER,
    training=TRAINING,
    mesh=ONE_DEVICE,
  )


@pytest.fixture(scope="session")
def trained_calm(
  calm_run: calm_stage.Run, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """The workdir of a finished run of stage two."""
  workdir = tmp_path_factory.mktemp("calm") / "run"
  train.train_run(calm_run, str(workdir))
  return workdir


@pytest.fixture(scope="session")
def trained_with_tokens(
  calm_run: calm_stage.Run, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """The workdir of a finished run of stage two with a token loss."""
  loss = dataclasses.replace(calm_run.loss, token_weight=3.0, token_every=2)
  workdir = tmp_path_factory.mktemp("tokens") / "run"
  train.train_run(dataclasses.replace(calm_run, loss=loss), str(workdir))
  return workdir


@pytest.fixture(scope="session")
def tempered_run(calm_run: calm_stage.Run, trained_calm: pathlib.Path) -> tempered_stage.Run:
  return tempered_stage.Run(
    data=calm_run.data,
    calm=str(trained_calm),
    model=calm_run.model,
    head=calm_run.head,
    loss=tempered_stage.Loss(samples=4, every=2, races=2, num_candidates=6),
    optimizer=OPTIMIZER,
    training=TRAINING,
    mesh=ONE_DEVICE,
  )


@pytest.fixture(scope="session")
def trained_tempered(
  tempered_run: tempered_stage.Run, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """The workdir of a finished run of a tempered head."""
  workdir = tmp_path_factory.mktemp("tempered") / "run"
  train.train_run(tempered_run, str(workdir))
  return workdir


@pytest.fixture(scope="session")
def transformer_run(tokens: str) -> transformer_stage.Run:
  return transformer_stage.Run(
    data=config.Data(tokens, 32),
    model=config.Transformer(layers=2, width=16, ffn=32, heads=2, kv_heads=1, init="fan_in"),
    optimizer=OPTIMIZER,
    training=TRAINING,
    mesh=ONE_DEVICE,
  )


@pytest.fixture(scope="session")
def trained_transformer(
  transformer_run: transformer_stage.Run, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """The workdir of a finished run of the baseline."""
  workdir = tmp_path_factory.mktemp("transformer") / "run"
  train.train_run(transformer_run, str(workdir))
  return workdir


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
  """Returns a function that writes a tokenizer.json of `size` words; the second is EOS."""

  def write(size: int) -> str:
    vocab = {"<unk>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, size)}}
    model = tokenizers_lib.Tokenizer(tokenizers_lib.models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers_lib.pre_tokenizers.Whitespace()
    model.add_special_tokens(["</s>"])
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    model.save(str(path))
    return str(path)

  return write


@pytest.fixture
def latent_reader(trained_calm: pathlib.Path, tmp_path: pathlib.Path) -> Callable[[str], str]:
  """Returns a function that writes an untrained workdir like `trained_calm` with another input."""

  def write(kind: str) -> str:
    trained = loading.load(str(trained_calm))
    sizes = dataclasses.replace(trained.run.model, input=kind)
    run = dataclasses.replace(trained.run, model=sizes)
    autoencoder = trained.parents["autoencoder"].run.model
    model = calm.Calm.build(sizes, run.head, autoencoder, trained.origin.vocab_size)
    params = model.initial(jax.random.key(0))
    kernel = params["head"]["out"]["kernel"]  # Zero at the start of training.
    params["head"]["out"]["kernel"] = jax.random.normal(jax.random.key(1), kernel.shape)
    target = tmp_path / "latent_reader"
    shutil.copytree(trained_calm / "autoencoder", target / "autoencoder")
    tokenizer = epath.Path(trained_calm / trained.origin.tokenizer_file)
    trained_lib.write(str(target), run, trained.origin, params, 1, tokenizer)
    return str(target)

  return write


@pytest.fixture
def other_tempered(trained_tempered: pathlib.Path, tmp_path: pathlib.Path) -> Callable:
  """Returns a function that writes a workdir like `trained_tempered`, of random weights.

  It takes the kind of the head and the input of the language model.
  """

  def write(kind: str, reads: str) -> pathlib.Path:
    trained = loading.load(str(trained_tempered))
    model = trained.parents["calm"]
    sizes = dataclasses.replace(model.run.model, input=reads)
    head = dataclasses.replace(model.run.head, kind=kind, steps=0 if kind == "energy" else 4)
    autoencoder = model.parents["autoencoder"].run.model
    calm_model = calm.Calm.build(sizes, head, autoencoder, model.origin.vocab_size)
    trunk = head_lib.Trunk(sizes.width, autoencoder.latent, sizes.init)
    models = (calm_model, tempered.Tempered(calm_model.head, trunk))
    calm_params, params = (_random(x.initial(jax.random.key(0))) for x in models)
    target = tmp_path / "other"
    shutil.copytree(trained_tempered / "calm/autoencoder", target / "calm/autoencoder")
    origin = dataclasses.replace(trained.origin, parents={"calm": fingerprint.of(calm_params)})
    tokenizer = epath.Path(trained_tempered / origin.tokenizer_file)
    for part, own, whose, weights in (
      ("calm", model.run, model.origin, calm_params),
      ("", trained.run, origin, params),
    ):
      run = dataclasses.replace(own, model=sizes, head=head)
      trained_lib.write(str(target / part), run, whose, weights, 1, tokenizer)
    return target

  return write


def _random(params):
  return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)


@pytest.fixture
def folder(tmp_path: pathlib.Path, words) -> pathlib.Path:
  """A copy of the k4 energy model's folder with a tokenizer; tests may change it."""
  copy = tmp_path / "energy"
  shutil.copytree(folders.GOLDEN / "k4/energy", copy)
  shutil.copyfile(words(folders.VOCAB["k4"]), copy / "tokenizer.json")
  return copy
