"""Claims about writing text: a prompt is kept whole, its tail constrains, the seed decides."""

import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import config, errors, workdir
from calm_jax.generation import decode
from calm_jax.models import memory

SYMBOLS = 4  # The known law: each of a patch's tokens is one of 0..3, all equally likely.
VOCAB = 10
K = 3
EOS = 9


class Codec:
  """Reads the latents, K numbers in [-0.5, 0.5), as the tokens' ranks."""

  sizes = config.Autoencoder(patch_size=K, latent=K)

  def apply(self, variables, z_Z, method):
    assert method == "decode"
    token_K = jnp.floor((z_Z + 0.5) * SYMBOLS).astype(int)
    return jax.nn.one_hot(token_K, VOCAB)


class Model:
  """Samples its noise, whatever the context; `hidden` shows in `seen` what it was given."""

  autoencoder = Codec()

  def __init__(self):
    self.seen: list[np.ndarray] = []

  def hidden(self, params, token_BPK, latent_BPZ, cache):
    jax.debug.callback(lambda tokens: self.seen.append(np.asarray(tokens)), token_BPK)
    return jnp.zeros((1, token_BPK.shape[1], 2)), cache

  def sample(self, params, hidden_BD, key, count):
    return jax.random.uniform(key, (count, 1, K), minval=-0.5, maxval=0.5)

  def empty_cache(self, batch, window):
    return memory.Cache(None, jnp.full((window,), -1), jnp.int32(0))


def writer(said: list[str] | None = None, appends_eos: bool = False, context=24, **settings):
  """A decoder over the known law, and its model."""
  run = config.CalmRun(
    data=config.Data("", context),
    model=config.Backbone(layers=1, width=2, ffn=2, heads=1, kv_heads=1),
    training=config.Training(compute_dtype="float32"),
  )
  origin = SimpleNamespace(start_patch=(5, 6, 7), appends_eos=appends_eos, eos_id=EOS)
  model = Model()
  trained = SimpleNamespace(
    model=model, run=run, origin=origin, params={}, autoencoder=SimpleNamespace(params={})
  )
  report = [].append if said is None else said.append
  return decode.Decoder(trained, decode.Settings(**settings), report), model


def write(decoder: decode.Decoder, prompt: list[int], seed: int = 0) -> list[int]:
  return [t for new in decoder.tokens(prompt, jax.random.key(seed)) for t in new]


def test_whole_patches_are_read_behind_the_start_of_a_document():
  decoder, model = writer(max_tokens=3)
  said = write(decoder, [1, 2, 3, 3, 2, 1])
  jax.effects_barrier()
  np.testing.assert_array_equal(model.seen[0], [[[5, 6, 7], [1, 2, 3], [3, 2, 1]]])
  assert len(said) == 3 and set(said) <= set(range(SYMBOLS))


@pytest.mark.parametrize("tail", [[2], [2, 3]])
def test_a_tail_opens_the_next_patch(tail: list[int]):
  said: list[str] = []
  decoder, model = writer(said, max_tokens=3)
  new = write(decoder, [1, 1, 1, *tail])
  jax.effects_barrier()
  np.testing.assert_array_equal(model.seen[0], [[[5, 6, 7], [1, 1, 1]]])  # Nothing padded.
  first = K - len(tail)
  np.testing.assert_array_equal(model.seen[1], [[[*tail, *new[:first]]]])
  assert len(said) == 1 and f"begin with its last {len(tail)} of {K} tokens" in said[0]
  share = int(said[0].split(": ")[1].split(" of ")[0]) / decode.TAIL_CANDIDATES
  assert abs(share - SYMBOLS ** -len(tail)) < 0.1


def test_what_follows_a_tail_has_the_models_law_given_the_tail():
  decoder, _ = writer(max_tokens=1)
  counts = np.bincount([write(decoder, [1, 3], seed)[0] for seed in range(400)], minlength=SYMBOLS)
  expected = 400 / SYMBOLS
  assert np.sum((counts - expected) ** 2) / expected < 16.3  # Chi-square, 3 degrees, p = 0.001.


def test_a_tail_that_no_candidate_meets_is_kept_and_told():
  said: list[str] = []
  decoder, model = writer(said, max_tokens=4)
  new = write(decoder, [2, 8])
  jax.effects_barrier()
  assert f"none of {decode.TAIL_ROUNDS * decode.TAIL_CANDIDATES} candidates" in said[0]
  assert "shares the first 1" in said[0]
  np.testing.assert_array_equal(model.seen[1], [[[2, 8, new[0]]]])


def test_the_seed_decides_the_text():
  decoder, _ = writer(max_tokens=12)
  assert write(decoder, [1], 0) == write(decoder, [1], 0) != write(decoder, [1], 1)


def test_max_tokens_ends_inside_a_patch():
  for limit in (1, 4, 9):
    assert len(write(writer(max_tokens=limit)[0], [])) == limit


def test_eos_ends_the_text_and_is_not_part_of_it(monkeypatch: pytest.MonkeyPatch):
  """Token 3 is declared EOS: what comes before the first 3 remains."""
  decoder, _ = writer(max_tokens=30)
  endless = write(decoder, [])
  monkeypatch.setattr(decoder._origin, "eos_id", 3)
  assert write(decoder, []) == endless  # No document ended with it in training.
  monkeypatch.setattr(decoder._origin, "appends_eos", True)
  assert write(decoder, []) == endless[: endless.index(3)]


def test_a_prompt_longer_than_an_example_keeps_its_end():
  said: list[str] = []
  decoder, model = writer(said, context=4 * K, max_tokens=1)
  write(decoder, list(range(1, 10)))
  jax.effects_barrier()
  np.testing.assert_array_equal(model.seen[0], [[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])
  assert "the model sees the last 3" in said[0]


def test_a_low_temperature_prefers_what_comes_often():
  """With a law of one frequent patch in place of the uniform one."""
  decoder, model = writer(max_tokens=K, temperature=0.5, num_candidates=100)

  uniform = model.sample

  def skewed(*args):
    sample_NBZ = uniform(*args)
    return jnp.where(sample_NBZ[..., :1] < 0, -0.4, sample_NBZ)  # Half of all draws.

  model.sample = skewed
  assert [write(decoder, [], seed) for seed in range(20)].count([0, 0, 0]) >= 19


@pytest.mark.parametrize(
  ("settings", "reason"),
  [
    ({"temperature": 0.0}, "above 0, got 0"),
    ({"temperature": 1.5}, r"\(0, 1\], got 1.5"),
    ({"temperature": 0.7}, "must be 1/n for a whole n"),
    ({"temperature": 0.25, "num_candidates": 3}, "at least 1/temperature = 4, got 3"),
    ({"max_tokens": 0}, "at least 1, got 0"),
  ],
)
def test_bad_settings_are_told(settings: dict, reason: str):
  with pytest.raises(errors.CalmError, match=reason):
    writer(**settings)


def test_pieces_give_the_text_and_never_half_a_character():
  content = "a€b🙂c".encode()

  def text(ids: list[int]) -> str:
    """Decodes as a tokenizer of bytes would."""
    return bytes(ids).decode("utf-8", "replace")

  new = iter([list(content[i : i + 1]) for i in range(2, len(content))])
  pieces = list(decode.pieces(text, list(content[:2]), new))
  assert "".join(pieces) == "€b🙂c"
  assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_trained_model_writes_the_same_with_its_cache_as_without(trained_calm: pathlib.Path):
  """Greedy in effect: one noise for all, so that only the hidden states can differ."""
  trained = workdir.load_calm(str(trained_calm))
  decoder = decode.Decoder(trained, decode.Settings(max_tokens=16), lambda line: None)
  prompt = list(range(20, 28))
  new = write(decoder, prompt)
  known = [*trained.origin.start_patch, *prompt, *new]
  for patch in range(4):
    token_1PK = np.array(known[: 12 + 4 * patch], np.int32).reshape(1, -1, 4)
    hidden_1PD, _ = trained.model.hidden(trained.params, token_1PK)
    law, key = decoder._law, jax.random.fold_in(jax.random.key(0), patch + 1)
    choice = law.choose(law.params, hidden_1PD[:, -1], key, jnp.zeros(4, int), 0, 1)
    assert choice.token_K.tolist() == known[12 + 4 * patch : 16 + 4 * patch]


@pytest.mark.parametrize("kind", ["continuous", "both"])
def test_a_model_that_reads_latents_reads_the_chosen_samples(kind: str, latent_reader):
  """By hand: posterior draws of the prompt, then the samples that its tokens came from."""
  trained = workdir.load_calm(latent_reader(kind))
  decoder, key = decode.Decoder(trained, decode.Settings(max_tokens=12), print), jax.random.key(3)
  prompt = [*trained.origin.start_patch, *range(20, 28)]
  new = [token for patch in decoder.tokens(prompt[4:], key) for token in patch]
  law, token_1PK = decoder._law, np.array(prompt, np.int32).reshape(1, -1, 4)
  latent_1PZ = law.latents(law.params, token_1PK, jax.random.fold_in(key, 0))
  assert latent_1PZ is not None
  for patch in range(3):
    hidden_1PD, _ = trained.model.hidden(trained.params, token_1PK, latent_1PZ)
    own_key = jax.random.fold_in(key, patch + 1)
    choice = law.choose(law.params, hidden_1PD[:, -1], own_key, jnp.zeros(4, int), 0, 1)
    assert choice.token_K.tolist() == new[4 * patch : 4 * patch + 4]
    token_1PK = np.concatenate([token_1PK, np.asarray(choice.token_K)[None, None]], axis=1)
    latent_1PZ = jnp.concatenate([latent_1PZ, choice.latent_Z[None, None]], axis=1)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_the_baseline_draws_at_any_temperature_exactly(temperature: float, trained_transformer):
  trained = workdir.load(str(trained_transformer), "transformer")
  assert isinstance(trained, workdir.TrainedTransformer)
  law = decode.TransformerLaw(trained, decode.Settings(temperature, num_candidates=1))
  hidden_1D = jax.random.normal(jax.random.key(0), (1, 16))
  table = trained.params["out"]["kernel"]
  p_V = np.asarray(jax.nn.softmax((hidden_1D @ table)[0] / temperature))
  keys = jax.random.split(jax.random.key(1), 4000)
  draw = jax.jit(jax.vmap(lambda key: law.choose(law.params, hidden_1D, key, 0, 0, 1).token_K[0]))
  counts_V = np.bincount(draw(keys), minlength=len(p_V))
  top = np.argsort(p_V)[-10:]
  error = np.sqrt(p_V[top] * (1 - p_V[top]) / 4000)
  assert np.all(np.abs(counts_V[top] / 4000 - p_V[top]) < 4.5 * error)
