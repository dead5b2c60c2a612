"""Claims about folders exported for the reference: its loader gets the same model.

The modules here are built like its own: the decoder's table is a parameter of its own, random
if the file does not hold it.
"""

import json
import pathlib

import jax
import numpy as np
import pytest
from folders import GOLDEN, VOCAB, agree

from calm_jax.interchange import tensors
from calm_jax.models import calm, layers
from calm_jax.running import conversion, loading

torch = pytest.importorskip("torch", reason="exported folders are opened by torch")
transformers = pytest.importorskip("transformers", reason="they are opened by transformers")

modeling_calm = pytest.importorskip("calm_jax.interchange.torch_module.modeling_calm")


@pytest.fixture(autouse=True)
def no_gradients():
  with torch.no_grad():
    yield


def untie(autoencoder) -> None:
  """Gives the decoder a random table of its own, and makes it use this table."""
  table = autoencoder.encoder.embed_tokens.weight
  autoencoder.decoder.lm_head_weight = torch.nn.Parameter(torch.randn(table.shape))
  decoder = autoencoder.decoder
  autoencoder.decode = lambda z_Z: torch.nn.functional.linear(decoder(z_Z), decoder.lm_head_weight)


class Autoencoder(modeling_calm.CalmAutoencoder):
  def __init__(self, config):
    super().__init__(config)
    untie(self)


class LanguageModel(modeling_calm.CalmModel):
  def __init__(self, config):
    super().__init__(config)
    untie(self.ae_model)


def read_config(folder: pathlib.Path) -> dict:
  return json.loads((folder / "config.json").read_text())


def opened_autoencoder(folder: pathlib.Path):
  config = modeling_calm.CalmAutoencoderConfig(**read_config(folder))
  return Autoencoder.from_pretrained(folder, config=config).eval()


def opened_language_model(folder: pathlib.Path, head: str):
  values = read_config(folder)
  inner = read_config(pathlib.Path(values["ae_path"]))
  config = modeling_calm.CalmConfig(**values, head=head, autoencoder=inner)
  return LanguageModel.from_pretrained(folder, config=config).eval()


@pytest.fixture(params=[2**30, 20_000], ids=["one file", "shards"])
def shard_bytes(request, monkeypatch):
  monkeypatch.setattr(tensors, "SHARD_BYTES", request.param)


@pytest.mark.parametrize("case", VOCAB)
def test_the_reference_decodes_the_same_with_an_exported_autoencoder(
  case, shard_bytes, words, tmp_path
):
  source = str(GOLDEN / case / "autoencoder")
  conversion.convert(source, str(tmp_path / "in"), "workdir", tokenizer=words(VOCAB[case]))
  conversion.convert(str(tmp_path / "in"), str(tmp_path / "out"), "reference")
  trained, reference_model = (
    loading.load(str(tmp_path / "in")),
    opened_autoencoder(tmp_path / "out"),
  )
  z_BZ = np.random.default_rng(0).normal(size=(50, trained.run.model.latent)).astype(np.float32)
  logits_BKV = layers.apply(trained.model, trained.params, z_BZ, method="decode")
  actual_BKV = reference_model.decode(torch.from_numpy(z_BZ))
  agree(actual_BKV, logits_BKV)
  np.testing.assert_array_equal(actual_BKV.argmax(-1), np.argmax(logits_BKV, -1))


@pytest.mark.parametrize("head", ["energy", "flow", "diffusion"])
def test_the_reference_generates_the_same_tokens_with_an_exported_model(
  head: str, shard_bytes, words, tmp_path
):
  source = str(GOLDEN / "k4" / head)
  conversion.convert(source, str(tmp_path / "in"), "workdir", tokenizer=words(VOCAB["k4"]))
  conversion.convert(str(tmp_path / "in"), str(tmp_path / "out"), "reference")
  trained = loading.load(str(tmp_path / "in"))
  reference_model = opened_language_model(tmp_path / "out", head)
  token_BPK = np.random.default_rng(0).integers(0, 90, (3, 5, 4)).astype(np.int32)
  hidden_BPD, _ = trained.model.hidden(trained.params, token_BPK)
  agree(reference_model.hidden_states(torch.from_numpy(token_BPK)), hidden_BPD)
  noise = np.array(trained.model.head.draw_noise(jax.random.key(0), (8, 3)))
  sample_NBZ = trained.model.samples(trained.params, hidden_BPD[:, -1], noise)
  token_NBK = calm.decode_tokens(
    trained.parents["autoencoder"].model, trained.parents["autoencoder"].params, sample_NBZ
  )
  actual_BPD = reference_model.hidden_states(torch.from_numpy(token_BPK))
  actual_NBZ = reference_model.samples(actual_BPD[:, -1], torch.from_numpy(noise))
  np.testing.assert_array_equal(reference_model.next_tokens(actual_NBZ), token_NBK)
  inner = opened_autoencoder(tmp_path / "out/autoencoder")
  np.testing.assert_array_equal(inner.decode(actual_NBZ).argmax(-1), token_NBK)
