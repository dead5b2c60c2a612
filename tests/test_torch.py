"""Claims about folders exported for PyTorch: they compute the same numbers as we do."""

import json
import pathlib

import jax
import numpy as np
import pytest
from folders import GOLDEN, agree

from calm_jax import config
from calm_jax.interchange import checking, names
from calm_jax.interchange.torch_module import modeling_calm
from calm_jax.models import calm, layers
from calm_jax.models.heads import head, registry, tempered
from calm_jax.running import conversion, loading

torch = pytest.importorskip("torch", reason="exported folders are opened by torch")
transformers = pytest.importorskip("transformers", reason="they are opened by transformers")


@pytest.fixture(autouse=True)
def no_gradients():
  with torch.no_grad():
    yield


@pytest.fixture
def opened(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
  """Exports a workdir for PyTorch and opens it with transformers."""
  monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
  monkeypatch.setattr(
    transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules")
  )

  def export(source: pathlib.Path):
    conversion.convert(str(source), str(tmp_path / "out"), "torch")
    return transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)

  return export


@pytest.fixture
def golden(words, tmp_path: pathlib.Path):
  """Converts a model of a golden case to a workdir, and returns its path."""

  def convert(case: str, model: str) -> pathlib.Path:
    size = json.loads((GOLDEN / case / "case.json").read_text())["vocab"]
    conversion.convert(
      str(GOLDEN / case / model), str(tmp_path / "in"), "workdir", tokenizer=words(size)
    )
    return tmp_path / "in"

  return convert


def some_tokens(vocab: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, vocab, shape).astype(np.int32)


@pytest.mark.parametrize("case", ["k4", "k2_gqa"])
@pytest.mark.parametrize("model", ["energy", "flow", "diffusion"])
def test_a_language_model_computes_the_same_in_torch(case, model, opened, golden):
  source = golden(case, model)
  torch_model, trained = opened(source), loading.load(str(source))
  size = trained.parents["autoencoder"].run.model.patch_size
  token_BPK = some_tokens(90, 3, 5, size)
  hidden_BPD, _ = trained.model.hidden(trained.params, token_BPK)
  actual_BPD = torch_model.hidden_states(torch.from_numpy(token_BPK))
  agree(actual_BPD, hidden_BPD)
  noise = trained.model.head.draw_noise(jax.random.key(0), (2, 3))
  sample_NBZ = trained.model.samples(trained.params, hidden_BPD[:, -1], noise)
  actual_NBZ = torch_model.samples(actual_BPD[:, -1], torch.from_numpy(np.array(noise)))
  agree(actual_NBZ, sample_NBZ, 1e-4 if model == "diffusion" else 1e-5)
  token_NBK = calm.decode_tokens(
    trained.parents["autoencoder"].model, trained.parents["autoencoder"].params, sample_NBZ
  )
  np.testing.assert_array_equal(torch_model.next_tokens(actual_NBZ), token_NBK)


def test_a_model_with_a_token_loss_opens_without_a_weight_left_over(
  opened, trained_with_tokens, tmp_path
):
  torch_model, trained = opened(trained_with_tokens), loading.load(str(trained_with_tokens))
  token_BPK = some_tokens(300, 2, 5, 4)
  hidden_BPD, _ = trained.model.hidden(trained.params, token_BPK)
  agree(torch_model.hidden_states(torch.from_numpy(token_BPK)), hidden_BPD)
  _, loaded = transformers.AutoModel.from_pretrained(
    tmp_path / "out", trust_remote_code=True, output_loading_info=True
  )
  assert not loaded["unexpected_keys"] and not loaded["missing_keys"]


def test_an_autoencoder_computes_the_same_in_torch(opened, trained_autoencoder):
  torch_model, trained = opened(trained_autoencoder), loading.load(str(trained_autoencoder))
  token_BPK = some_tokens(300, 2, 3, 4)
  posterior = layers.apply(trained.model, trained.params, token_BPK, method="encode")
  for actual, expected in zip(
    torch_model.encode(torch.from_numpy(token_BPK)), posterior, strict=True
  ):
    agree(actual, expected)
  logits_BPKV = layers.apply(trained.model, trained.params, posterior[0], method="decode")
  agree(torch_model.decode(torch.from_numpy(np.array(posterior[0]))), logits_BPKV)


@pytest.mark.parametrize("kind", ["continuous", "both"])
def test_the_latent_input_computes_the_same_in_torch(kind, opened, latent_reader, tmp_path):
  source = latent_reader(kind)
  torch_model, trained = opened(source), loading.load(source)
  token_BPK = some_tokens(300, 2, 5, 4)
  latent_BPZ = np.random.default_rng(1).normal(size=(2, 5, 8)).astype(np.float32)
  hidden_BPD, _ = trained.model.hidden(trained.params, token_BPK, latent_BPZ)
  actual_BPD = torch_model.hidden_states(torch.from_numpy(token_BPK), torch.from_numpy(latent_BPZ))
  agree(actual_BPD, hidden_BPD)
  torch_model.config.eos_token_id = None  # So that no draw ends a text.
  assert torch_model.generate(torch.from_numpy(token_BPK[0].reshape(-1)).long(), 8).shape == (8,)
  conversion.convert(str(tmp_path / "out"), str(tmp_path / "back"), "workdir")
  back = loading.load(str(tmp_path / "back"))
  assert back.run.model.input == kind
  jax.tree.map(np.testing.assert_array_equal, back.params, trained.params)


def test_torch_generates_text(opened, trained_calm):
  """The cache gives the same patches as recomputing the hidden states."""
  torch_model, start = opened(trained_calm), loading.load(str(trained_calm)).origin.start_patch
  torch_model.config.eos_token_id = None  # So that no draw ends a text.
  prompt_S = torch.tensor([*start, *range(20, 28)])
  new_S = torch_model.generate(prompt_S, 12, generator=torch.Generator().manual_seed(0))
  generator, text_S = torch.Generator().manual_seed(0), prompt_S
  for _ in range(3):
    hidden_1PD = torch_model.hidden_states(text_S.reshape(1, -1, 4))
    patch_1K, _ = torch_model.choose(hidden_1PD[:, -1], 1, 1, generator)
    text_S = torch.cat([text_S, patch_1K[0]])
  np.testing.assert_array_equal(new_S, text_S[len(prompt_S) :])
  with pytest.raises(ValueError, match="whole patches of 4 tokens"):
    torch_model.generate(prompt_S[:3], 4)


def test_a_text_ends_at_eos_in_torch(opened, trained_calm, monkeypatch):
  """One text ends in its second patch, the other at the requested length."""
  torch_model = opened(trained_calm)
  eos, patches = torch_model.config.eos_token_id, iter([[5, 6, 7, 8], [9, 1, 9, 9], [5, 6, 7, 8]])
  assert eos == 1

  def choose(hidden_BD, n, count, generator=None):
    patch_K = torch.tensor(next(patches))
    without_eos_K = torch.where(patch_K == eos, 2, patch_K)
    return torch.stack([patch_K, without_eos_K]), torch.zeros(2, 8)

  monkeypatch.setattr(torch_model, "choose", choose)
  new_BS = torch_model.generate(torch.arange(20, 28).expand(2, -1), 10)
  assert new_BS.tolist() == [[5, 6, 7, 8, 9] + 5 * [1], [5, 6, 7, 8, 9, 2, 9, 9, 5, 6]]


def test_temperature_in_torch_is_the_batch_approximation(opened, trained_calm):
  """A pool of A three times, B twice and five others once: at T = 1/2 A has 3/4, B has 1/4."""
  module = next(
    m for n, m in transformers.dynamic_module_utils.sys.modules.items() if "modeling_calm" in n
  )
  pool_1NK = torch.tensor([0, 2, 0, 3, 1, 4, 0, 5, 1, 6]).reshape(1, -1, 1)
  weight_N = module.candidate_weights(pool_1NK, 2)[0]
  np.testing.assert_allclose([weight_N[pool_1NK[0, :, 0] == x].sum() for x in (0, 1)], [0.75, 0.25])


def test_a_tempered_head_computes_the_same_in_torch(opened, trained_tempered):
  torch_model, trained = opened(trained_tempered), loading.load(str(trained_tempered))
  width = trained.run.model.width
  hidden_BD = np.random.default_rng(0).normal(size=(3, width)).astype(np.float32)
  noise = np.array(trained.model.head.draw_noise(jax.random.key(0), (2, 3)))
  drawn = {}
  for power in (4.0, 2.0, 1.0):
    condition = trained.model.condition(trained.params, hidden_BD, np.full(3, power))
    drawn[power] = torch_model.tempered_samples(
      torch.from_numpy(hidden_BD), torch.from_numpy(noise), torch.tensor(power)
    )
    agree(drawn[power], trained.model.samples(trained.params, condition, noise))
  assert (drawn[4.0] - drawn[2.0]).abs().max() > 1e-4


def test_torch_generates_with_one_draw_at_the_temperatures_of_a_tempered_head(
  opened, trained_tempered, tmp_path
):
  """At 1 and below 0.25, with candidates of the language model's own head."""
  torch_model, start = opened(trained_tempered), loading.load(str(trained_tempered)).origin
  conversion.convert(str(trained_tempered / "calm"), str(tmp_path / "own"), "torch")
  own_model = transformers.AutoModel.from_pretrained(tmp_path / "own", trust_remote_code=True)
  for model in (torch_model, own_model):
    model.config.eos_token_id = None  # So that no draw ends a text.
  prompt_S = torch.tensor([*start.start_patch, *range(20, 28)])

  def generate(model, value: float, count: int = 200) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return model.generate(prompt_S, 8, value, count, generator).tolist()

  generator, text_S = torch.Generator().manual_seed(0), prompt_S
  for _ in range(2):
    hidden_1PD = torch_model.hidden_states(text_S.reshape(1, -1, 4))
    patch_1K, _ = torch_model.draw_once(hidden_1PD[:, -1], 1 / 0.4, generator)
    text_S = torch.cat([text_S, patch_1K[0]])
  expected = text_S[len(prompt_S) :].tolist()
  assert generate(torch_model, 0.4) == expected == generate(torch_model, 0.4, count=1)
  assert generate(torch_model, 0.333) == generate(torch_model, 1 / 3)
  for value in (1.0, 0.2):
    assert generate(torch_model, value) == generate(own_model, value)
  torch_model.config.least_temperature = 0.334  # 1/T is rounded to 3, which is above 1/0.334.
  assert generate(torch_model, 0.334) == generate(torch_model, 0.334, count=1)
  torch_model.config.least_temperature = 0.25
  for value in (0.15, 1.5, 0.0, -1.0, float("nan"), 1e-320):
    with pytest.raises(ValueError, match=r"must be 1/n \(.*\), or lie in \[0.25, 1\], got"):
      generate(torch_model, value)
    with pytest.raises(ValueError, match=r"must be 1/n \(1, 0.5, 0.333, ...\), got"):
      generate(own_model, value)


def test_a_tempered_head_is_imported_and_verified(trained_tempered, tmp_path):
  conversion.convert(str(trained_tempered), str(tmp_path / "out"), "torch")
  assert checking.shapes(tmp_path / "out") == "as config.json says"
  conversion.convert(str(tmp_path / "out"), str(tmp_path / "back"), "workdir")
  source, back = (loading.load(str(path)) for path in (trained_tempered, tmp_path / "back"))
  assert back.run.loss.least_temperature == source.run.loss.least_temperature == 0.25
  jax.tree.map(np.testing.assert_array_equal, back.params, source.params)
  model, expected = back.parents["calm"], source.parents["calm"]
  jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)
  own, inner = (x.parents["autoencoder"].params for x in (model, expected))
  jax.tree.map(np.testing.assert_array_equal, own, inner)


@pytest.mark.parametrize("kind", ["energy", "flow", "diffusion"])
def test_every_tempered_head_has_tensors_in_torch(kind: str):
  sizes, trunk = config.Head(kind=kind, blocks=2, noise=4), head.Trunk(16, 8, "fan_in")
  model = tempered.Tempered(registry.build(sizes, trunk), trunk)
  written = names.outgoing(model.initial(jax.random.key(0)), names.tempered(sizes))
  settings = dict(head=kind, noise_size=4, num_mlp_layers=2, latent_size=8, hidden_size=16)
  small = dict(num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1, vocab_size=9)
  autoencoder = dict(vocab_size=9, hidden_size=8, latent_size=8)
  torch_model = modeling_calm.CalmModel(
    modeling_calm.CalmConfig(**settings, **small, autoencoder=autoencoder, least_temperature=0.25)
  )
  theirs = {
    name: tuple(x.shape)
    for name, x in torch_model.state_dict().items()
    if name.startswith(("tempered_head", "power_embd"))
  }
  assert {tensor.name: tensor.shape for tensor in written} == theirs


def test_what_transformers_saves_opens_again(opened, trained_calm, tmp_path):
  first = opened(trained_calm)
  first.save_pretrained(tmp_path / "saved")
  second = transformers.AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
  for name in ("patch_size", "hidden_size", "rope_theta", "head", "eos_token_id", "autoencoder"):
    assert getattr(second.config, name) == getattr(first.config, name)
  token_BPK = torch.from_numpy(some_tokens(300, 2, 5, 4))
  agree(second.hidden_states(token_BPK), first.hidden_states(token_BPK))


@pytest.mark.parametrize("kind", ["llama", "reference"])
def test_transformers_loads_the_baseline_as_a_llama(kind, trained_transformer, tmp_path):
  conversion.convert(str(trained_transformer), str(tmp_path / "out"), kind)
  torch_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  assert type(torch_model).__name__ == "LlamaForCausalLM"
  trained = loading.load(str(trained_transformer), "transformer")
  token_BS = some_tokens(300, 2, 20)
  logits_BSV = layers.apply(trained.model, trained.params, token_BS)
  agree(torch_model(torch.from_numpy(token_BS)).logits, logits_BSV)


def test_a_llama_saved_by_transformers_is_imported(trained_transformer, tmp_path):
  """Its config.json names the rotary base and the type differently, depending on the version."""
  conversion.convert(str(trained_transformer), str(tmp_path / "out"), "llama")
  torch_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  torch_model.save_pretrained(tmp_path / "saved")
  trained = loading.load(str(trained_transformer))
  tokenizer = str(tmp_path / "out/tokenizer.model")
  conversion.convert(
    str(tmp_path / "saved"), str(tmp_path / "back"), "workdir", tokenizer=tokenizer
  )
  back = loading.load(str(tmp_path / "back"))
  jax.tree.map(np.testing.assert_array_equal, back.params, trained.params)
  assert vars(back.run.model) | {"init": "fan_in"} == vars(trained.run.model)


@pytest.mark.parametrize(
  ("model", "kind"), [("ar", "llama"), ("energy", "torch"), ("autoencoder", "torch")]
)
def test_transformers_finds_the_tokenizer(model, kind, golden, tmp_path):
  conversion.convert(str(golden("k4", model)), str(tmp_path / "out"), kind)
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    tmp_path / "out", trust_remote_code=kind == "torch"
  )
  assert tokenizer("w7 w99")["input_ids"] == [7, 99] and tokenizer.eos_token == "</s>"
