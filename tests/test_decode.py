"""Claims about writing text: a prompt is kept whole, its tail constrains, the seed decides."""

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


class Head:
  """Samples its noise, whatever the context."""

  def condition(self, params, hidden_BD):
    return hidden_BD

  def draw_noise(self, key, shape):
    return jax.random.uniform(key, (*shape, K), minval=-0.5, maxval=0.5)

  def samples(self, params, condition, noise):
    return noise


class Model:
  """A context that changes nothing; `seen` holds the patches that `hidden` was given."""

  autoencoder = Codec()

  def __init__(self):
    self.head, self.seen = Head(), []

  def hidden(self, params, token_BPK, latent_BPZ, cache):
    def note(tokens, start_B):
      self.seen.append([row[begin:].tolist() for row, begin in zip(tokens, start_B, strict=True)])

    rows, count = token_BPK.shape[:2]
    begun = jnp.where(cache.next_position == 0, cache.start_B, 0)
    jax.debug.callback(note, token_BPK, begun, ordered=True)
    nothing = jnp.zeros((1, rows, 1, count))
    cache = cache.advanced(memory.LayerCache(nothing, nothing), count)
    return jnp.zeros((rows, count, 2)), cache


def writer(said: list[str] | None = None, appends_eos: bool = False, context=24, **sampler):
  """A decoder over the known law, and its model."""
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
  report = [].append if said is None else said.append
  return texts.decoder(trained, requests.Sampler(**sampler), report), model


def write_all(decoder: decode.Decoder, *wishes: requests.Request, every: int = 2):
  """What each request gets: tokens, and all that is told of the patches."""
  writing, found = decoder.start(wishes), [decode.Written() for _ in wishes]
  while not writing.done:
    for whole, part in zip(found, writing.advance(every), strict=True):
      for name in ("tokens", "drawn", "seen", "settled"):
        getattr(whole, name).extend(getattr(part, name))
  jax.effects_barrier()
  return found


def write(decoder: decode.Decoder, prompt: list[int], seed: int = 0, **wish) -> list[int]:
  return write_all(decoder, requests.Request(tuple(prompt), seed=seed, **wish))[0].tokens


def test_whole_patches_are_read_behind_the_start_of_a_document():
  decoder, model = writer()
  said = write(decoder, [1, 2, 3, 3, 2, 1], max_tokens=3)
  assert model.seen[0] == [[[5, 6, 7], [1, 2, 3], [3, 2, 1]]]
  assert len(said) == 3 and set(said) <= set(range(SYMBOLS))


@pytest.mark.parametrize("tail", [[2], [2, 3]])
def test_a_tail_opens_the_next_patch(tail: list[int]):
  said: list[str] = []
  decoder, model = writer(said)
  new = write(decoder, [1, 1, 1, *tail], max_tokens=3)
  assert model.seen[0] == [[[5, 6, 7], [1, 1, 1]]]  # Nothing padded.
  assert model.seen[1] == [[[*tail, *new[: K - len(tail)]]]]
  assert len(said) == 1 and f"begin with its last {len(tail)} of {K} tokens" in said[0]


def test_what_follows_a_tail_has_the_models_law_given_the_tail():
  decoder, _ = writer()
  wishes = [requests.Request((1, 3), max_tokens=1, seed=seed) for seed in range(400)]
  counts = np.bincount([x.tokens[0] for x in write_all(decoder, *wishes)], minlength=SYMBOLS)
  expected = 400 / SYMBOLS
  assert np.sum((counts - expected) ** 2) / expected < 16.3  # Chi-square, 3 degrees, p = 0.001.


def test_a_tail_that_no_candidate_meets_is_kept_and_told():
  said: list[str] = []
  decoder, model = writer(said)
  new = write(decoder, [2, 8], max_tokens=4)
  assert f"none of {batching.TAIL_ROUNDS * batching.TAIL_CANDIDATES} candidates" in said[0]
  assert "shares the first 1" in said[0]
  assert model.seen[1] == [[[2, 8, new[0]]]]


def test_the_seed_decides_the_text():
  decoder, _ = writer()
  one, same, other = (write(decoder, [1], seed, max_tokens=12) for seed in (0, 0, 1))
  assert one == same != other


def test_a_text_does_not_depend_on_what_is_written_beside_it():
  """Prompts of unequal length, temperatures, ends; alone each gives the same."""
  said: list[str] = []
  decoder, _ = writer(said)
  wishes = [
    requests.Request((1, 2, 3, 3, 2, 1, 0, 2), max_tokens=7, seed=3),
    requests.Request((), temperature=0.5, max_tokens=20, seed=4, num_candidates=50),
    requests.Request((1, 1, 1), temperature=0.4, max_tokens=2, seed=5, number=6),
  ]
  together = write_all(decoder, *wishes, every=3)
  for wish, found in zip(wishes, together, strict=True):
    assert write_all(decoder, wish)[0] == dataclasses.replace(found, drawn=ANY)
    assert len(found.tokens) == wish.max_tokens
  assert sum("text 1: the prompt ends inside a patch" in line for line in said) == 1


def test_max_tokens_ends_inside_a_patch():
  for limit in (1, 4, 9):
    assert len(write(writer()[0], [], max_tokens=limit)) == limit


def test_eos_ends_the_text_and_is_not_part_of_it():
  """Token 3 is declared EOS: what comes before the first 3 remains."""
  endless = write(writer()[0], [], max_tokens=30)
  decoder, model = writer(appends_eos=True)
  decoder.origin.eos_id = 3
  assert write(decoder, [], max_tokens=30) == endless[: endless.index(3)]
  assert len(model.seen) < 30 / K  # Nothing was read after it, but for what fills a step.


def test_a_prompt_longer_than_an_example_keeps_its_end():
  said: list[str] = []
  decoder, model = writer(said, context=4 * K)
  write(decoder, list(range(1, 10)), max_tokens=1)
  assert model.seen[0] == [[[1, 2, 3], [4, 5, 6], [7, 8, 9]]]
  assert "the model sees the last 3" in said[0]


@pytest.mark.parametrize("rule", sorted(rules.RULES))
def test_a_low_temperature_prefers_what_comes_often(rule: str):
  """With a law of one frequent patch in place of the uniform one."""
  decoder, model = writer(rule=rule)

  def skewed(params, condition, noise):
    return jnp.where(noise[..., :1] < 0, -0.4, noise)  # Half of all draws.

  model.head.samples = skewed
  wishes = [requests.Request((), 0.1, 100, max_tokens=K, seed=seed) for seed in range(20)]
  assert [x.tokens for x in write_all(decoder, *wishes)].count([0, 0, 0]) >= 19


def test_draws_that_end_unsettled_are_told_or_an_error():
  """Four draws of 64 equally likely patches hold no three equal ones."""
  found = write_all(writer(rule="exact")[0], requests.Request((), 1 / 3, 4, max_tokens=6))[0]
  assert found.settled == [False, False] and found.drawn == [4, 4]
  with pytest.raises(errors.CalmError, match="patch 1 is not settled after 4 draws"):
    write(writer(at_limit="error")[0], [], temperature=1 / 3, num_candidates=4)


@pytest.mark.parametrize(
  ("wish", "reason"),
  [
    ({"temperature": 0.0}, "above 0 and finite, got 0"),
    ({"temperature": 1.5}, r"\(0, 1\], got 1.5"),
    ({"temperature": 0.25, "num_candidates": 3}, "at least 1/temperature = 4, got 3"),
    ({"max_tokens": 0}, r"must lie in \[1, 1073741824\], got 0"),
    ({"seed": -1}, "got -1"),
    ({"stop": ("",)}, "stop string is empty"),
  ],
)
def test_bad_requests_are_told(wish: dict, reason: str):
  with pytest.raises(errors.CalmError, match=reason):
    write(writer()[0], [], **wish)


def test_an_unknown_rule_is_refused():
  with pytest.raises(errors.CalmError, match="did you mean 'first'"):
    writer(rule="frist")


def bytes_text(ids: list[int]) -> str:
  """Decodes as a tokenizer of bytes would."""
  return bytes(ids).decode("utf-8", "replace")


def test_a_stream_gives_the_text_and_never_half_a_character():
  content = "a€b🙂c".encode()
  stream = text.Stream(bytes_text, list(content[:2]))
  pieces = [stream.push(list(content[i : i + 1])) for i in range(2, len(content))]
  pieces.append(stream.close())
  assert "".join(pieces) == "€b🙂c"
  assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_stream_ends_before_a_stop_string_and_shows_nothing_of_it():
  stream = text.Stream(bytes_text, list(b"stop in the prompt: "), ("stop", "st."))
  shown = [stream.push(list(piece)) for piece in (b"a s", b"t", b"art s", b"to", b"p more", b"x")]
  assert shown == ["a ", "", "start ", "", "", ""] and stream.stopped and not stream.close()


def test_a_stream_shows_what_only_began_like_a_stop_string_in_the_end():
  stream = text.Stream(bytes_text, [], ("stop",))
  assert [stream.push(list(b"a sto")), stream.close(), stream.stopped] == ["a ", "sto", False]


def wanted(key: jax.Array, rows: int = 1) -> candidates.Wanted:
  """A patch each at temperature 1, without a tail."""
  ones_B = jnp.ones(rows, jnp.int32)
  return candidates.Wanted(
    jnp.broadcast_to(key, (rows,)), ones_B.astype(float), ones_B, ones_B,
    jnp.zeros((rows, 4), jnp.int32), 0 * ones_B, ones_B > 0,
  )  # fmt: skip


def test_a_trained_model_writes_the_same_with_its_cache_as_without(trained_calm: pathlib.Path):
  """One noise for all, so that only the hidden states can differ."""
  trained = loading.load(str(trained_calm))
  decoder = texts.decoder(trained, requests.Sampler(), lambda line: None)
  prompt = list(range(20, 28))
  new = write(decoder, prompt, max_tokens=16)
  known = [*trained.origin.start_patch, *prompt, *new]
  own = jax.random.fold_in(jax.random.key(0), 0)
  for patch in range(4):
    token_1PK = np.array(known[: 12 + 4 * patch], np.int32).reshape(1, -1, 4)
    hidden_1PD, _ = trained.model.hidden(trained.params, token_1PK)
    law, key = decoder.law, jax.random.fold_in(own, patch + 1)
    choice = law.choose(law.params, hidden_1PD[:, -1], wanted(key), 1, [1])
    assert choice.patch.token_K[0].tolist() == known[12 + 4 * patch : 16 + 4 * patch]


@pytest.mark.parametrize("kind", ["continuous", "both"])
def test_a_model_that_reads_latents_reads_the_chosen_samples(kind: str, latent_reader):
  """By hand: posterior draws of the prompt, then the samples that its tokens came from."""
  trained = loading.load(latent_reader(kind))
  decoder = texts.decoder(trained, requests.Sampler(), print)
  decode_patches = 8  # What the prompt of three patches is filled up to.
  prompt = [*trained.origin.start_patch, *range(20, 28)]
  new = write(decoder, prompt[4:], 3, max_tokens=12)
  law, own = decoder.law, jax.random.fold_in(jax.random.key(3), 0)
  token_1PK = np.array(prompt, np.int32).reshape(1, -1, 4)
  filled_1PK = np.concatenate([np.zeros((1, decode_patches - 3, 4), np.int32), token_1PK], axis=1)
  key = candidates.keys_of(own[None], candidates.POSTERIOR, jnp.zeros(1, int))
  latent_1PZ = law.latents(law.params, filled_1PK, key)[:, decode_patches - 3 :]
  for patch in range(3):
    hidden_1PD, _ = trained.model.hidden(trained.params, token_1PK, latent_1PZ)
    key = jax.random.fold_in(own, patch + 1)
    choice = law.choose(law.params, hidden_1PD[:, -1], wanted(key), 1, [1])
    assert choice.patch.token_K[0].tolist() == new[4 * patch : 4 * patch + 4]
    token_1PK = np.concatenate([token_1PK, np.asarray(choice.patch.token_K)[None]], axis=1)
    latent_1PZ = jnp.concatenate([latent_1PZ, choice.patch.latent_Z[None]], axis=1)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_the_baseline_draws_at_any_temperature_exactly(temperature: float, trained_transformer):
  trained = loading.load(str(trained_transformer), "transformer")
  assert isinstance(trained, trained_lib.Trained)
  law = laws.TransformerLaw(trained, requests.Sampler())
  hidden_1D = jax.random.normal(jax.random.key(0), (1, 16))
  table = trained.params["out"]["kernel"]
  p_V = np.asarray(jax.nn.softmax((hidden_1D @ table)[0] / temperature))
  asked = wanted(jax.random.key(1), 4000)._replace(
    key_B=jax.random.split(jax.random.key(1), 4000),
    power_B=jnp.full(4000, law.power(requests.Request((), temperature))),
  )
  hidden_BD = jnp.broadcast_to(hidden_1D, (4000, 16))
  token_B1 = law.choose(law.params, hidden_BD, asked, 1, [1]).patch.token_K
  counts_V = np.bincount(token_B1[:, 0], minlength=len(p_V))
  top = np.argsort(p_V)[-10:]
  error = np.sqrt(p_V[top] * (1 - p_V[top]) / 4000)
  assert np.all(np.abs(counts_V[top] / 4000 - p_V[top]) < 4.5 * error)
