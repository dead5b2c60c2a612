"""Prompt -> patches, one at a time: prefill, candidates, choice, the next hidden state."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax import errors, workdir
from calm_jax.generation import temperature as temperature_lib
from calm_jax.models import calm, layers, memory

# A prompt's tail must be met by chance: candidates a round, and rounds before giving up.
TAIL_CANDIDATES = 256
TAIL_ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class Settings:
  """How text is drawn.

  Attributes:
    temperature: 1 is the model's own law; for CALM 1/n.
    num_candidates: CALM's draws a patch for the batch approximation below 1.
    max_tokens: new tokens after which a text ends without EOS.
  """

  temperature: float = 1.0
  num_candidates: int = 200
  max_tokens: int = 256

  def __post_init__(self):
    if not (math.isfinite(self.temperature) and self.temperature > 0):
      raise errors.CalmError(f"temperature must be above 0, got {self.temperature}")
    if self.max_tokens < 1:
      raise errors.CalmError(f"max_tokens must be at least 1, got {self.max_tokens}")


class Choice(NamedTuple):
  """The next patch.

  Attributes:
    token_K: its tokens. latent_Z: the sample they were decoded from, where the model
      reads it.
    agreeing: candidates that begin with the whole tail. longest: the tokens of the
      tail that the patch begins with.
  """

  token_K: jax.Array
  latent_Z: jax.Array | None
  agreeing: jax.Array
  longest: jax.Array


class CalmLaw:
  """The next patch by CALM: candidates from the head, decoded, one of them chosen."""

  def __init__(self, trained: workdir.TrainedCalm, settings: Settings):
    self._model, self.patch_size = trained.model, trained.model.autoencoder.sizes.patch_size
    self._n = temperature_lib.reciprocal(settings.temperature)
    if settings.num_candidates < self._n:
      raise errors.CalmError(
        f"num_candidates must be at least 1/temperature = {self._n}, got {settings.num_candidates}"
      )
    self.draws = settings.num_candidates if self._n > 1 else 1
    self.params = (trained.params, trained.autoencoder.params)
    self._reads_latents = trained.run.model.reads_latents

  def empty_cache(self, window: int) -> memory.Cache:
    return self._model.empty_cache(1, window)

  def advance(self, params, token_1PK, latent_1PZ, cache):
    """Returns the hidden state after P patches, and the cache with them in it."""
    hidden_1PD, cache = self._model.hidden(params[0], token_1PK, latent_1PZ, cache)
    return hidden_1PD[:, -1], cache

  def latents(self, params, token_1PK, key):
    """Returns draws of the posteriors of given patches, [1, P, Z]; None if none are read."""
    if not self._reads_latents:
      return None
    codec = self._model.autoencoder
    mean_1PZ, log_std_1PZ = layers.apply(codec, params[1], token_1PK, method="encode")
    return calm.posterior_draws(key, mean_1PZ, log_std_1PZ, 1)[0]

  def choose(self, params, hidden_1D, key, tail_K, tail_length, count) -> Choice:
    """Returns one of `count` candidates, of those that begin with the tail if there are any."""
    draw_key, choice_key = jax.random.split(key)
    z_NZ = self._model.sample(params[0], hidden_1D, draw_key, count)[:, 0]
    token_NK = calm.decode_tokens(self._model.autoencoder, params[1], z_NZ)
    within_K = jnp.arange(self.patch_size) < tail_length
    met_NK = jnp.cumprod((token_NK == tail_K[None]) & within_K[None], axis=-1)
    agreed_N = jnp.sum(met_NK, axis=-1)
    longest = jnp.max(agreed_N)
    # Where no candidate meets the whole tail, those that meet most of it stand in.
    weight_N = temperature_lib.batch_weights(token_NK, agreed_N == longest, self._n)
    chosen = temperature_lib.choose(choice_key, weight_N)
    latent_Z = z_NZ[chosen] if self._reads_latents else None
    return Choice(token_NK[chosen], latent_Z, jnp.sum(agreed_N == tail_length), longest)


class TransformerLaw:
  """The next token by the baseline: P(x)^(1/T), exactly."""

  patch_size = draws = 1

  def __init__(self, trained: workdir.TrainedTransformer, settings: Settings):
    self._model, self._sizes = trained.model, trained.run.model
    self._temperature, self.params = settings.temperature, trained.params

  def empty_cache(self, window: int) -> memory.Cache:
    return memory.Cache.empty(self._sizes, 1, window, self._model.dtype)

  def advance(self, params, token_1P1, latent, cache):
    """Returns the hidden state after P tokens, and the cache with them in it."""
    token_1P = token_1P1[..., 0]
    hidden_1PD, cache = layers.apply(self._model, params, token_1P, cache, method="hidden")
    return hidden_1PD[:, -1], cache

  def latents(self, params, token_1P1, key) -> None:
    """Tokens have none."""

  def choose(self, params, hidden_1D, key, tail, tail_length, count) -> Choice:
    """Returns a token; single tokens leave no tail."""
    logits_1V = layers.apply(self._model, params, hidden_1D, method="logits")
    token_1 = jax.random.categorical(key, logits_1V / self._temperature).astype(jnp.int32)
    return Choice(token_1, None, jnp.int32(1), jnp.int32(0))


# A stage that writes text is a row.
LAWS: dict[str, Callable[..., CalmLaw | TransformerLaw]] = {
  "calm": CalmLaw,
  "transformer": TransformerLaw,
}


@dataclasses.dataclass
class _Position:
  """Where a text stands: the hidden state that predicts the next patch, and the cache."""

  hidden_1D: jax.Array
  cache: memory.Cache


class Decoder:
  """Writes texts with one trained model.

  The last `window` patches, as many as an example showed the model in training,
  are kept in a ring; older ones are forgotten, so texts have no longest length.
  """

  def __init__(
    self,
    trained: workdir.TrainedCalm | workdir.TrainedTransformer,
    settings: Settings,
    report: Callable[[str], None],
  ):
    self._law = LAWS[trained.run.stage](trained, settings)
    self._origin, self._settings, self._report = trained.origin, settings, report
    self._window = trained.run.data.context // self._law.patch_size - 1
    self._prefill = jax.jit(self._law.advance)
    self._next = jax.jit(self._law.advance, donate_argnums=3)
    self._choose = jax.jit(self._law.choose, static_argnames="count")
    self._latents = jax.jit(self._law.latents)

  def _start(self, token_S: Sequence[int], key: jax.Array) -> tuple[_Position, np.ndarray]:
    """Reads all whole patches of a prompt; returns where it stands, and its tail."""
    size, start = self._law.patch_size, self._origin.start_patch
    known = np.array([*start, *token_S], np.int32)
    whole = len(known) // size
    if not whole:
      raise errors.CalmError(
        f"the prompt has {len(known)} tokens, and imported weights know no start of a document: "
        f"give a prompt of at least a patch, {size} tokens"
      )
    token_1PK = known[: whole * size].reshape(1, whole, size)[:, -self._window :]
    if whole > self._window:
      self._report(
        f"the prompt has {whole - bool(start)} patches; the model sees the last {self._window}, as "
        "many as an example had in training"
      )
    cache = self._law.empty_cache(self._window)
    latent_1PZ = self._latents(self._law.params, token_1PK, key)
    position = _Position(*self._prefill(self._law.params, token_1PK, latent_1PZ, cache))
    return position, known[whole * size :]

  def _first_patch(
    self, position: _Position, tail: np.ndarray, key: jax.Array
  ) -> tuple[np.ndarray, jax.Array | None]:
    """Returns a patch that begins with the prompt's tail, and its latent."""
    size = self._law.patch_size
    tail_K = np.zeros(size, np.int32)
    tail_K[: len(tail)] = tail
    count = max(self._law.draws, TAIL_CANDIDATES)
    best, best_length, drawn = tail_K, -1, 0
    for attempt in range(TAIL_ROUNDS):
      choice = self._choose(
        self._law.params, position.hidden_1D, jax.random.fold_in(key, attempt), tail_K, len(tail),
        count=count,
      )  # fmt: skip
      drawn += count
      if int(choice.longest) > best_length:
        best, best_length = np.array(choice.token_K), int(choice.longest)
      if int(choice.agreeing):
        self._report(
          f"the prompt ends inside a patch: {int(choice.agreeing)} of the last {count} of {drawn} "
          f"candidates begin with its last {len(tail)} of {size} tokens"
        )
        return best, choice.latent_Z
    best[: len(tail)] = tail
    self._report(
      f"the prompt ends inside a patch: none of {drawn} candidates begins with its last "
      f"{len(tail)} of {size} tokens; took one that shares the first {best_length} and put the "
      "prompt's in their place"
    )
    latent_11Z = self._latents(self._law.params, best[None, None], key)
    return best, None if latent_11Z is None else latent_11Z[0, 0]

  def tokens(self, token_S: Sequence[int], key: jax.Array) -> Iterator[list[int]]:
    """Yields the new tokens of one text, a patch at a time, up to EOS or max_tokens.

    The same model, prompt, settings and key give the same tokens.

    Raises:
      CalmError: if the prompt is too short for a model that knows no start of a document.
    """
    size, no_tail = self._law.patch_size, np.zeros(self._law.patch_size, np.int32)
    position, tail = self._start(token_S, jax.random.fold_in(key, 0))
    written, patch = 0, 0
    while written < self._settings.max_tokens:
      patch_key = jax.random.fold_in(key, patch + 1)
      if patch == 0 and len(tail):
        chosen_K, latent_Z = self._first_patch(position, tail, patch_key)
        new = chosen_K[len(tail) :].tolist()
      else:
        choice = self._choose(
          self._law.params, position.hidden_1D, patch_key, no_tail, 0, count=self._law.draws
        )
        chosen_K, latent_Z = np.asarray(choice.token_K), choice.latent_Z
        new = chosen_K.tolist()
      new = new[: self._settings.max_tokens - written]
      if self._origin.appends_eos and self._origin.eos_id in new:
        yield new[: new.index(self._origin.eos_id)]
        return
      yield new
      written, patch = written + len(new), patch + 1
      read = None if latent_Z is None else latent_Z[None, None]
      position = _Position(
        *self._next(self._law.params, chosen_K.reshape(1, 1, size), read, position.cache)
      )


def pieces(
  decode: Callable[[list[int]], str], prompt: Sequence[int], new: Iterator[list[int]]
) -> Iterator[str]:
  """Yields text as its tokens come; characters split between tokens wait for their last byte."""
  token_S = list(prompt)
  text_of = functools.partial(_stable, decode)
  shown = len(text_of(token_S))
  for patch in new:
    token_S.extend(patch)
    text = text_of(token_S)
    yield text[shown:]
    shown = max(shown, len(text))
  yield decode(token_S)[shown:]


def _stable(decode: Callable[[list[int]], str], token_S: list[int]) -> str:
  return decode(token_S).rstrip("\N{REPLACEMENT CHARACTER}")
