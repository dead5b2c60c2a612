"""Prompt -> patches, one at a time: prefill, candidates, choice, the next hidden state."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax import errors, workdir
from calm_jax.generation import temperature as temperature_lib
from calm_jax.models import backbone, calm

# A prompt's tail must be met by chance: candidates a round, and rounds before giving up.
TAIL_CANDIDATES = 256
TAIL_ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class Settings:
  """How text is drawn.

  Attributes:
    temperature: 1/n; 1 is the model's own law.
    num_candidates: draws a patch for the batch approximation below 1.
    max_tokens: new tokens after which a text ends without EOS.
  """

  temperature: float = 1.0
  num_candidates: int = 200
  max_tokens: int = 256

  def __post_init__(self):
    n = temperature_lib.reciprocal(self.temperature)
    if self.num_candidates < n:
      raise errors.CalmError(
        f"num_candidates must be at least 1/temperature = {n}, got {self.num_candidates}"
      )
    if self.max_tokens < 1:
      raise errors.CalmError(f"max_tokens must be at least 1, got {self.max_tokens}")


@dataclasses.dataclass
class _Position:
  """Where a text stands: the hidden state that predicts the next patch, and the cache."""

  hidden_1D: jax.Array
  cache: backbone.Cache


class Decoder:
  """Writes texts with one trained model.

  The last `window` patches, as many as an example showed the backbone in
  training, are kept in a ring; older ones are forgotten, so texts have no
  longest length.
  """

  def __init__(
    self, trained: workdir.TrainedCalm, settings: Settings, report: Callable[[str], None]
  ):
    self._trained, self._settings, self._report = trained, settings, report
    self._patch_size = trained.model.autoencoder.sizes.patch_size
    self._window = trained.run.data.context // self._patch_size - 1
    self._n = temperature_lib.reciprocal(settings.temperature)
    self._draws = settings.num_candidates if self._n > 1 else 1
    self._prefill = jax.jit(self._advance)
    self._next = jax.jit(self._advance, donate_argnums=2)
    self._candidates = jax.jit(self._draw, static_argnames="count")

  def _advance(self, params, token_1PK, cache):
    hidden_1PD, cache = self._trained.model.hidden(params, token_1PK, cache)
    return hidden_1PD[:, -1], cache

  def _draw(self, params, frozen, hidden_1D, key, tail_K, tail_length, *, count):
    """Returns (chosen tokens [K], agreeing candidates, longest agreeing prefix)."""
    model = self._trained.model
    noise_key, choice_key = jax.random.split(key)
    noise_N1R = model.head.draw_noise(noise_key, (count, 1))
    z_NZ = model.samples(params, hidden_1D, noise_N1R)[:, 0]
    token_NK = calm.decode_tokens(model.autoencoder, frozen, z_NZ)
    within_K = jnp.arange(self._patch_size) < tail_length
    met_NK = jnp.cumprod((token_NK == tail_K[None]) & within_K[None], axis=-1)
    agreed_N = jnp.sum(met_NK, axis=-1)
    longest = jnp.max(agreed_N)
    # Where no candidate meets the whole tail, those that meet most of it stand in.
    weight_N = temperature_lib.batch_weights(token_NK, agreed_N == longest, self._n)
    chosen_K = token_NK[temperature_lib.choose(choice_key, weight_N)]
    return chosen_K, jnp.sum(agreed_N == tail_length), longest

  def _start(self, token_S: Sequence[int]) -> tuple[_Position, np.ndarray]:
    """Reads all whole patches of a prompt; returns where it stands, and its tail."""
    size = self._patch_size
    known = np.array([*self._trained.origin.start_patch, *token_S], np.int32)
    whole = len(known) // size
    token_1PK = known[: whole * size].reshape(1, whole, size)[:, -self._window :]
    if whole > self._window:
      self._report(
        f"the prompt has {whole - 1} patches; the model sees the last {self._window}, as many as "
        "an example had in training"
      )
    dtype = jnp.dtype(self._trained.run.training.compute_dtype)
    cache = backbone.empty_cache(self._trained.run.model, 1, self._window, dtype)
    position = _Position(*self._prefill(self._trained.params, token_1PK, cache))
    return position, known[whole * size :]

  def _first_patch(self, position: _Position, tail: np.ndarray, key: jax.Array) -> np.ndarray:
    """Returns a patch that begins with the prompt's tail."""
    size = self._patch_size
    tail_K = np.zeros(size, np.int32)
    tail_K[: len(tail)] = tail
    count = max(self._draws, TAIL_CANDIDATES)
    best, best_length, drawn = tail_K, -1, 0
    for attempt in range(TAIL_ROUNDS):
      chosen_K, agreeing, longest = self._candidates(
        self._trained.params, self._trained.autoencoder.params, position.hidden_1D,
        jax.random.fold_in(key, attempt), tail_K, len(tail), count=count,
      )  # fmt: skip
      drawn += count
      if int(longest) > best_length:
        best, best_length = np.array(chosen_K), int(longest)
      if int(agreeing):
        self._report(
          f"the prompt ends inside a patch: {int(agreeing)} of the last {count} of {drawn} "
          f"candidates begin with its last {len(tail)} of {size} tokens"
        )
        return best
    best[: len(tail)] = tail
    self._report(
      f"the prompt ends inside a patch: none of {drawn} candidates begins with its last "
      f"{len(tail)} of {size} tokens; took one that shares the first {best_length} and put the "
      "prompt's in their place"
    )
    return best

  def tokens(self, token_S: Sequence[int], key: jax.Array) -> Iterator[list[int]]:
    """Yields the new tokens of one text, a patch at a time, up to EOS or max_tokens.

    The same model, prompt, settings and key give the same tokens.
    """
    origin, size = self._trained.origin, self._patch_size
    position, tail = self._start(token_S)
    written, patch = 0, 0
    while written < self._settings.max_tokens:
      patch_key = jax.random.fold_in(key, patch)
      if patch == 0 and len(tail):
        chosen_K = self._first_patch(position, tail, patch_key)
        new = chosen_K[len(tail) :].tolist()
      else:
        chosen_K, _, _ = self._candidates(
          self._trained.params, self._trained.autoencoder.params, position.hidden_1D, patch_key,
          np.zeros(size, np.int32), 0, count=self._draws,
        )  # fmt: skip
        new = np.asarray(chosen_K).tolist()
      new = new[: self._settings.max_tokens - written]
      if origin.appends_eos and origin.eos_id in new:
        yield new[: new.index(origin.eos_id)]
        return
      yield new
      written, patch = written + len(new), patch + 1
      position = _Position(
        *self._next(self._trained.params, np.asarray(chosen_K)[None, None], position.cache)
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
