"""Claims about decoding: prompts are kept whole, tails constrain patches, seeds determine texts."""

import dataclasses
import pathlib
from types import SimpleNamespace
from unittest.mock import ANY

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import config, errors
from calm_jax.generation import batching, candidates, decode, laws, requests, rules, text
from calm_jax.models import memory
from calm_jax.running import loading, texts
from calm_jax.stages import calm as calm_stage
from calm_jax.training import trained as trained_lib

SYMBOLS = 4  # Each of a patch's tokens is uniformly distributed over 0..3.
VOCAB = 10
K = 3
EOS = 9


class Autoencoder:
  """Decodes each of the K entries of a latent, in [-0.5, 0.5), to one of SYMBOLS tokens."""

  sizes = config.Autoencoder(patch_size=K, latent=K)

  def apply(self, variables, z_Z, method):
    assert method == "decode"
    token_K = jnp.floor((z_Z + 0.5) * SYMBOLS).astype(int)
    return jax.nn.one_hot(token_K, VOCAB)


class Head:
  """Returns its noise as samples, independent of the hidden state."""

  def condition(self, params, hidden_BD):
    return hidden_BD

  def draw_noise(self, key, shape):
    return jax.random.uniform(key, (*shape, K), minval=-0.5, maxval=0.5)

  def samples(self, params, condition, noise):
    return noise


class Model:
  """Hidden states of zeros; `seen` records the patches that `hidden` was called with."""

  autoencoder = Autoencoder()

  def __init__(self):
    self.head, self.seen = Head(), []

  def hidden(self, params, token_BPK, latent_BPZ, cache):
    def record(tokens, start_B):
      self.seen.append([row[begin:].tolist() for row, begin in zip(tokens, start_B, strict=True)])

    rows, count = token_BPK.shape[:2]
    begin_B = jnp.where(cache.next_position == 0, cache.start_B, 0)
    jax.debug.callback(record, token_BPK, begin_B, ordered=True)
    zeros = jnp.zeros((1, rows, 1, count))
    cache = cache.advanced(memory.LayerCache(zeros, zeros), count)
    return jnp.zeros((rows, count, 2)), cache


def make_decoder(
  reports: list[str] | None = None, appends_eos: bool = False, context=24, **sampler
):
  """Returns a decoder of uniformly distributed tokens, and its model."""
  run = calm_stage.Run(
    data=config.Data("", context),
    model=config.Backbone(layers=1, width=2, ffn=2, heads=1, kv_heads=1),
    training=config.Training(compute_dtype="float32"),
  )
  origin = SimpleNamespace(start_patch=(5, 6, 7), appends_eos=appends_eos, eos_id=EOS)
  model = Model()
  params = {"head": {}}
  autoencoder = SimpleNamespace(params={}, model=model.autoencoder)
  trained = SimpleNamespace(
    model=model, run=run, origin=origin, params=params, parents={"autoencoder": autoencoder}
  )
  report = [].append if reports is None else reports.append
  return texts.decoder(trained, requests.Sampler(**sampler), report), model


def generate_all(decoder: decode.Decoder, *batch: requests.Request, every: int = 2):
  """Returns the complete `decode.Written` of each request."""
  text_batch, results = decoder.start(batch), [decode.Written() for _ in batch]
  while not text_batch.done:
    for result, part in zip(results, text_batch.advance(every), strict=True):
      for name in ("tokens", "drawn", "seen", "settled"):
        getattr(result, name).extend(getattr(part, name))
  jax.effects_barrier()
  return results


def generate(decoder: decode.Decoder, prompt: list[int], seed: int = 0, **settings) -> list[int]:
  return generate_all(decoder, requests.Request(tuple(prompt), seed=seed, **settings))[0].tokens


def test_complete_patches_are_read_after_the_start_of_a_document():
  decoder, model = make_decoder()
  tokens = generate(decoder, [1, 2, 3, 3, 2, 1], max_tokens=3)
  assert model.seen[0] == [[[5, 6, 7], [1, 2, 3], [3, 2, 1]]]
  assert len(tokens) == 3 and set(tokens) <= set(range(SYMBOLS))


@pytest.mark.parametrize("tail", [[2], [2, 3]])
def test_the_first_generated_patch_begins_with_the_tail(tail: list[int]):
  reports: list[str] = []
  decoder, model = make_decoder(reports)
  tokens = generate(decoder, [1, 1, 1, *tail], max_tokens=3)
  assert model.seen[0] == [[[5, 6, 7], [1, 1, 1]]]  # Without padding.
  assert model.seen[1] == [[[*tail, *tokens[: K - len(tail)]]]]
  assert len(reports) == 1 and f"begin with its last {len(tail)} of {K} tokens" in reports[0]


def test_tokens_after_a_tail_have_the_conditional_distribution():
  decoder, _ = make_decoder()
  batch = [requests.Request((1, 3), max_tokens=1, seed=seed) for seed in range(400)]
  counts = np.bincount([x.tokens[0] for x in generate_all(decoder, *batch)], minlength=SYMBOLS)
  expected = 400 / SYMBOLS
  assert np.sum((counts - expected) ** 2) / expected < 16.3  # Chi-square, 3 degrees, p = 0.001.


def test_a_tail_that_no_candidate_matches_is_kept_and_reported():
  reports: list[str] = []
  decoder, model = make_decoder(reports)
  tokens = generate(decoder, [2, 8], max_tokens=4)
  assert f"none of {batching.TAIL_ROUNDS * batching.TAIL_CANDIDATES} candidates" in reports[0]
  assert "shares the first 1" in reports[0]
  assert model.seen[1] == [[[2, 8, tokens[0]]]]


def test_the_seed_determines_the_text():
  decoder, _ = make_decoder()
  first, repeated, other = (generate(decoder, [1], seed, max_tokens=12) for seed in (0, 0, 1))
  assert first == repeated != other


def test_a_text_does_not_depend_on_the_rest_of_its_batch():
  """Prompts, temperatures and lengths differ; each request gives the same text alone."""
  reports: list[str] = []
  decoder, _ = make_decoder(reports)
  batch = [
    requests.Request((1, 2, 3, 3, 2, 1, 0, 2), max_tokens=7, seed=3),
    requests.Request((), temperature=0.5, max_tokens=20, seed=4, num_candidates=50),
    requests.Request((1, 1, 1), temperature=0.4, max_tokens=2, seed=5, number=6),
  ]
  results = generate_all(decoder, *batch, every=3)
  for request, result in zip(batch, results, strict=True):
    assert generate_all(decoder, request)[0] == dataclasses.replace(result, drawn=ANY)
    assert len(result.tokens) == request.max_tokens
  assert sum("text 1: the prompt ends inside a patch" in line for line in reports) == 1


def test_max_tokens_may_end_a_text_inside_a_patch():
  for limit in (1, 4, 9):
    assert len(generate(make_decoder()[0], [], max_tokens=limit)) == limit


def test_eos_ends_the_text_and_is_not_part_of_it():
  """With token 3 as EOS, the text is the tokens before the first 3."""
  endless = generate(make_decoder()[0], [], max_tokens=30)
  decoder, model = make_decoder(appends_eos=True)
  decoder.origin.eos_id = 3
  assert generate(decoder, [], max_tokens=30) == endless[: endless.index(3)]
  assert len(model.seen) < 30 / K  # No patch after EOS is read, except to complete a step.


def test_of_a_prompt_longer_than_an_example_the_end_is_read():
  reports: list[str] = []
  decoder, model = make_decoder(reports, context=4 * K)
  generate(decoder, list(range(1, 10)), max_tokens=1)
  assert model.seen[0] == [[[1, 2, 3], [4, 5, 6], [7, 8, 9]]]
  assert "the model sees the last 3" in reports[0]


@pytest.mark.parametrize("rule", sorted({*rules.RULES} - {rules.DIRECT}))
def test_a_low_temperature_prefers_the_most_frequent_patch(rule: str):
  """One patch has more than half of the probability."""
  decoder, model = make_decoder(rule=rule)

  def skewed(params, condition, noise):
    return jnp.where(noise[..., :1] < 0, -0.4, noise)  # Half of all draws.

  model.head.samples = skewed
  batch = [requests.Request((), 0.1, 100, max_tokens=K, seed=seed) for seed in range(20)]
  assert [x.tokens for x in generate_all(decoder, *batch)].count([0, 0, 0]) >= 19


def test_unsettled_patches_are_reported_or_an_error():
  """Four draws of 64 equally likely patches have no three that are equal."""
  request = requests.Request((), 1 / 3, 4, max_tokens=6)
  result = generate_all(make_decoder(rule="exact")[0], request)[0]
  assert result.settled == [False, False] and result.drawn == [4, 4]
  with pytest.raises(errors.CalmError, match="patch 1 is not settled after 4 draws"):
    generate(make_decoder(at_limit="error")[0], [], temperature=1 / 3, num_candidates=4)


@pytest.mark.parametrize(
  ("settings", "reason"),
  [
    ({"temperature": 0.0}, "above 0 and finite, got 0"),
    ({"temperature": 1.5}, r"\(0, 1\], got 1.5"),
    ({"temperature": 0.25, "num_candidates": 3}, "at least 1/temperature = 4, got 3"),
    ({"max_tokens": 0}, r"must lie in \[1, 1073741824\], got 0"),
    ({"seed": -1}, "got -1"),
    ({"stop": ("",)}, "stop string is empty"),
  ],
)
def test_bad_requests_are_refused(settings: dict, reason: str):
  with pytest.raises(errors.CalmError, match=reason):
    generate(make_decoder()[0], [], **settings)


def test_an_unknown_rule_is_refused():
  with pytest.raises(errors.CalmError, match="did you mean 'first'"):
    make_decoder(rule="frist")


def decode_bytes(ids: list[int]) -> str:
  """Decodes ids as UTF-8 bytes."""
  return bytes(ids).decode("utf-8", "replace")


def test_a_stream_returns_the_text_without_partial_characters():
  content = "a€b🙂c".encode()
  stream = text.Stream(decode_bytes, list(content[:2]))
  pieces = [stream.push(list(content[i : i + 1])) for i in range(2, len(content))]
  pieces.append(stream.close())
  assert "".join(pieces) == "€b🙂c"
  assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_stream_ends_before_a_stop_string_and_shows_no_part_of_it():
  stream = text.Stream(decode_bytes, list(b"stop in the prompt: "), ("stop", "st."))
  shown = [stream.push(list(piece)) for piece in (b"a s", b"t", b"art s", b"to", b"p more", b"x")]
  assert shown == ["a ", "", "start ", "", "", ""] and stream.stopped and not stream.close()


def test_an_incomplete_stop_string_is_shown_at_the_end():
  stream = text.Stream(decode_bytes, [], ("stop",))
  assert [stream.push(list(b"a sto")), stream.close(), stream.stopped] == ["a ", "sto", False]


def wanted(key: jax.Array, rows: int = 1) -> candidates.Wanted:
  """Returns constraints on a patch per row: temperature 1, no tail."""
  ones_B = jnp.ones(rows, jnp.int32)
  return candidates.Wanted(
    jnp.broadcast_to(key, (rows,)),
    ones_B.astype(float),
    ones_B.astype(float),
    ones_B,
    ones_B,
    jnp.zeros((rows, 4), jnp.int32),
    0 * ones_B,
    ones_B > 0,
  )


def test_a_trained_model_generates_the_same_with_and_without_its_cache(trained_calm: pathlib.Path):
  """The noise is the same, so only the hidden states can differ."""
  trained = loading.load(str(trained_calm))
  decoder = texts.decoder(trained, requests.Sampler(), lambda line: None)
  prompt = list(range(20, 28))
  tokens = generate(decoder, prompt, max_tokens=16)
  all_tokens = [*trained.origin.start_patch, *prompt, *tokens]
  own = jax.random.fold_in(jax.random.key(0), 0)
  for patch in range(4):
    token_1PK = np.array(all_tokens[: 12 + 4 * patch], np.int32).reshape(1, -1, 4)
    hidden_1PD, _ = trained.model.hidden(trained.params, token_1PK)
    law, key = decoder.law, jax.random.fold_in(own, patch + 1)
    choice = law.choose(law.params, hidden_1PD[:, -1], wanted(key), 1, [1])
    assert choice.patch.token_K[0].tolist() == all_tokens[12 + 4 * patch : 16 + 4 * patch]


@pytest.mark.parametrize("kind", ["continuous", "both"])
def test_a_model_that_reads_latents_reads_the_chosen_samples(kind: str, latent_reader):
  """By hand: posterior draws for the prompt, then the samples whose tokens were chosen."""
  trained = loading.load(latent_reader(kind))
  decoder = texts.decoder(trained, requests.Sampler(), print)
  decode_patches = 8  # The prompt of three patches is padded to this.
  prompt = [*trained.origin.start_patch, *range(20, 28)]
  tokens = generate(decoder, prompt[4:], 3, max_tokens=12)
  law, own = decoder.law, jax.random.fold_in(jax.random.key(3), 0)
  token_1PK = np.array(prompt, np.int32).reshape(1, -1, 4)
  padded_1PK = np.concatenate([np.zeros((1, decode_patches - 3, 4), np.int32), token_1PK], axis=1)
  key = candidates.keys_of(own[None], candidates.POSTERIOR, jnp.zeros(1, int))
  latent_1PZ = law.latents(law.params, padded_1PK, key)[:, decode_patches - 3 :]
  for patch in range(3):
    hidden_1PD, _ = trained.model.hidden(trained.params, token_1PK, latent_1PZ)
    key = jax.random.fold_in(own, patch + 1)
    choice = law.choose(law.params, hidden_1PD[:, -1], wanted(key), 1, [1])
    assert choice.patch.token_K[0].tolist() == tokens[4 * patch : 4 * patch + 4]
    token_1PK = np.concatenate([token_1PK, np.asarray(choice.patch.token_K)[None]], axis=1)
    latent_1PZ = jnp.concatenate([latent_1PZ, choice.patch.latent_Z[None]], axis=1)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_the_baseline_samples_exactly_at_any_temperature(temperature: float, trained_transformer):
  trained = loading.load(str(trained_transformer), "transformer")
  assert isinstance(trained, trained_lib.Trained)
  law = laws.TransformerLaw(trained, requests.Sampler())
  hidden_1D = jax.random.normal(jax.random.key(0), (1, 16))
  table = trained.params["out"]["kernel"]
  p_V = np.asarray(jax.nn.softmax((hidden_1D @ table)[0] / temperature))
  patch_request = wanted(jax.random.key(1), 4000)._replace(
    key_B=jax.random.split(jax.random.key(1), 4000),
    power_B=jnp.full(4000, law.powers(requests.Request((), temperature))[1]),
  )
  hidden_BD = jnp.broadcast_to(hidden_1D, (4000, 16))
  token_B1 = law.choose(law.params, hidden_BD, patch_request, 1, [1]).patch.token_K
  counts_V = np.bincount(token_B1[:, 0], minlength=len(p_V))
  top = np.argsort(p_V)[-10:]
  error = np.sqrt(p_V[top] * (1 - p_V[top]) / 4000)
  assert np.all(np.abs(counts_V[top] / 4000 - p_V[top]) < 4.5 * error)
