"""Requests -> patches: one compiled loop generates a batch of texts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax import errors
from calm_jax.generation import batching, candidates, laws, requests
from calm_jax.models import memory
from calm_jax.training import trained as trained_lib


class _State(NamedTuple):
  """The progress of the texts.

  Attributes:
    hidden_BD: hidden states that predict the next patch.
    cache: a `memory.Cache` of the patches before it.
    patch: number of the next patch, from 0.
    written_B: number of new tokens so far.
    done_B: whether the text has ended.
  """

  hidden_BD: jax.Array
  cache: Any
  done_B: jax.Array
  written_B: jax.Array
  patch: jax.Array


@dataclasses.dataclass
class Written:
  """The patches that a call of `TextBatch.advance` added to one text.

  Attributes:
    tokens: new tokens.
    ended: whether the text is complete.
    drawn, seen: for each patch, the number of candidates drawn, and of those that the rule saw.
    settled: for each patch, whether the rule settled it before the draws ended.
  """

  tokens: list[int] = dataclasses.field(default_factory=list)
  ended: bool = False
  drawn: list[int] = dataclasses.field(default_factory=list)
  seen: list[int] = dataclasses.field(default_factory=list)
  settled: list[bool] = dataclasses.field(default_factory=list)


class Decoder:
  """Generates texts with one trained model.

  The cache is a ring of the last `window` patches, as many as the model read of an example in
  training. It overwrites older patches, so the length of a text is not limited.
  """

  def __init__(
    self,
    trained: trained_lib.Trained,
    law: laws.Law,
    sampler: requests.Sampler,
    report: Callable[[str], None],
  ):
    """Compiles on first use.

    Args:
      trained: the trained stage.
      law: distribution of the stage's next patch, made for `sampler`.
      sampler: how patches are drawn below temperature 1.
      report: prints a line about a prompt.
    """
    self.law = law
    self.origin, self.sampler, self.report = trained.origin, sampler, report
    self.window = law.window
    self.prefill = jax.jit(self._prefill, static_argnames="slots")
    self.steps = jax.jit(
      self._steps, static_argnames=("slots", "sizes", "count"), donate_argnames="state"
    )

  def _prefill(self, params, token_BPK, start_B, max_tokens_B, key_B, slots: int) -> _State:
    """Reads the complete patches of the prompts, which begin at patch `start_B`."""
    zeros_B = jnp.zeros_like(start_B)
    posterior_key_B = candidates.keys_of(key_B, candidates.POSTERIOR, zeros_B)
    latent_BPZ = self.law.latents(params, token_BPK, posterior_key_B)
    cache = memory.Cache.empty(slots, start_B, min(slots, self.window))
    hidden_BD, cache = self.law.advance(params, token_BPK, latent_BPZ, cache)
    return _State(hidden_BD, cache, max_tokens_B < 1, zeros_B, jnp.int32(0))

  def _steps(
    self,
    params,
    arrays: batching.RequestArrays,
    state: _State,
    slots: int,
    sizes: tuple[int, ...],
    count: int,
  ) -> tuple[_State, candidates.Choice]:
    """Generates up to T = `count` patches of every text; returns the state and choices [T, B, ...].

    Choices after the end of a text are undefined.
    """

    def step(state: _State) -> tuple[_State, candidates.Choice]:
      first = arrays.first
      length_B = jnp.where(state.patch == 0, first.length_B, 0)
      wanted = first._replace(
        key_B=jax.vmap(jax.random.fold_in, in_axes=(0, None))(first.key_B, state.patch + 1),
        attempts_B=jnp.where(length_B > 0, first.attempts_B, first.limit_B),
        length_B=length_B,
        active_B=~state.done_B,
      )
      choice = self.law.choose(params, state.hidden_BD, wanted, slots, list(sizes))
      token_BK, latent_BZ = choice.patch
      new_BK = jnp.arange(token_BK.shape[1])[None] >= length_B[:, None]
      written_B = state.written_B + jnp.sum(new_BK, axis=1)
      done_B = state.done_B | (written_B >= arrays.max_tokens_B)
      if self.origin.appends_eos:
        done_B |= jnp.any((token_BK == self.origin.eos_id) & new_BK, axis=1)
      latent_B1Z = None if latent_BZ is None else latent_BZ[:, None]
      hidden_BD, cache = self.law.advance(params, token_BK[:, None], latent_B1Z, state.cache)
      return _State(hidden_BD, cache, done_B, written_B, state.patch + 1), choice

    def body(carry):
      index, state, choices = carry
      state, choice = step(state)
      choices = jax.tree.map(lambda x, new: x.at[index].set(new), choices, choice)
      return index + 1, state, choices

    def is_unfinished(carry):
      index, state, _ = carry
      return (index < count) & ~jnp.all(state.done_B)

    _, choice = jax.eval_shape(step, state)
    choices = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), choice)
    _, state, choices = jax.lax.while_loop(is_unfinished, body, (jnp.int32(0), state, choices))
    # The host needs no latents.
    return state, choices._replace(patch=choices.patch._replace(latent_Z=None))

  def start(self, batch: Sequence[requests.Request]) -> "TextBatch":
    """Reads the prompts of a batch.

    Raises:
      CalmError: for a request that can't be satisfied, or a prompt that is too short for a
        model that has no start of a document.
    """
    return TextBatch(self, batch)


class TextBatch:
  """A batch of texts in generation: call `advance` until all have ended.

  Attributes:
    state: the progress of the texts, on the devices.
  """

  def __init__(self, decoder: Decoder, batch: Sequence[requests.Request]):
    """Reads the prompts; see `Decoder.start`."""
    self._decoder, self._batch, law = decoder, list(batch), decoder.law
    draw_power, power = zip(*map(law.powers, batch), strict=True)
    for row, request in enumerate(batch):
      if note := law.note(request):
        decoder.report(f"{self._name(row)}{note}")
    prompts, tails = zip(*map(self._prompt, range(len(batch))), strict=True)
    token_BPK, start_B = batching.aligned(prompts, decoder.window)
    arrays = batching.request_arrays(batch, power, draw_power, tails, law.patch_size)
    self._arrays = batching.placed(arrays)
    self._tails = [len(tail) for tail in tails]
    limit = np.asarray(self._arrays.first.limit_B).tolist()
    least = max(law.least(s, n) for s, n in zip(power, limit, strict=True))
    self._slots = max(limit)
    self._sizes = tuple(candidates.round_sizes(len(batch), least, self._slots))
    new_patches = max(-(-request.max_tokens // law.patch_size) for request in batch)
    self.state = decoder.prefill(
      law.params,
      batching.placed(token_BPK),
      batching.placed(start_B),
      self._arrays.max_tokens_B,
      self._arrays.first.key_B,
      slots=batching.ring(batching.bucket(token_BPK.shape[1] + new_patches, decoder.window)),
    )
    self._ended = [False] * len(batch)
    self._count = [0] * len(batch)
    self._patch = 0

  def _name(self, row: int) -> str:
    return f"text {row + 1}: " if len(self._batch) > 1 else ""

  def _prompt(self, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the complete patches of a prompt that the model sees, [P, K], and its tail."""
    decoder, size = self._decoder, self._decoder.law.patch_size
    start = decoder.origin.start_patch
    tokens = np.array([*start, *self._batch[row].prompt], np.int32)
    patches = len(tokens) // size
    if not patches:
      raise errors.CalmError(
        f"{self._name(row)}the prompt has {len(tokens)} tokens, and imported weights have no start "
        f"of a document: give a prompt of at least a patch, {size} tokens"
      )
    if patches > decoder.window:
      decoder.report(
        f"{self._name(row)}the prompt has {patches - bool(start)} patches; the model sees the last "
        f"{decoder.window}, as many as an example had in training"
      )
    token_PK = tokens[: patches * size].reshape(patches, size)
    return token_PK[-decoder.window :], tokens[patches * size :]

  @property
  def done(self) -> bool:
    """Whether all texts have ended."""
    return all(self._ended)

  def end(self, row: int) -> None:
    """Ends a text early."""
    self._ended[row] = True
    self.state = self.state._replace(done_B=self.state.done_B.at[row].set(True))

  def advance(self, count: int) -> list[Written]:
    """Generates up to `count` patches, and returns what they add to each text.

    Raises:
      CalmError: if draws end before the rule settles and the sampler treats that as an error.
    """
    decoder = self._decoder
    self.state, choices = decoder.steps(
      decoder.law.params,
      self._arrays,
      self.state,
      slots=self._slots,
      sizes=self._sizes,
      count=count,
    )
    choices = jax.device_get(choices)
    written = [
      self._row(row, jax.tree.map(lambda x, row=row: x[:, row], choices))
      for row in range(len(self._batch))
    ]
    self._patch += count
    return written

  def _row(self, row: int, choices: candidates.Choice) -> Written:
    """Returns what the choices [T, ...] of its patches add to one text."""
    request, written = self._batch[row], Written(ended=self._ended[row])
    tail = self._tails[row] if self._patch == 0 else 0
    eos = self._decoder.origin.eos_id if self._decoder.origin.appends_eos else None
    for patch, token_K in enumerate(choices.patch.token_K):
      if written.ended:
        break
      if tail:
        self._report_tail(row, jax.tree.map(lambda x: x[0], choices), tail)
      tokens = token_K[tail:].tolist()[: request.max_tokens - self._count[row]]
      tail = 0
      if eos in tokens:
        tokens, written.ended = tokens[: tokens.index(eos)], True
      self._count[row] += len(tokens)
      written.ended |= self._count[row] >= request.max_tokens
      written.tokens += tokens
      written.drawn.append(int(choices.drawn_B[patch]))
      written.seen.append(int(choices.seen_B[patch]))
      written.settled.append(bool(choices.settled_B[patch]))
      if not written.settled[-1] and self._decoder.sampler.at_limit == requests.ERROR:
        raise errors.CalmError(
          f"{self._name(row)}patch {self._patch + patch + 1} is not settled after "
          f"{written.seen[-1]} draws at temperature {request.temperature}: raise num_candidates, "
          "or take --at_limit=batch"
        )
    self._ended[row] = written.ended
    return written

  def _report_tail(self, row: int, choice: candidates.Choice, tail: int) -> None:
    """Reports how many candidates began with the prompt's tail of `tail` tokens."""
    size = self._decoder.law.patch_size
    message = f"{self._name(row)}the prompt ends inside a patch: "
    if choice.agreed_B:
      message += (
        f"{choice.agreed_B} of {choice.drawn_B} candidates begin with its last {tail} of {size} "
        "tokens"
      )
    else:
      message += (
        f"none of {choice.drawn_B} candidates begins with its last {tail} of {size} tokens; took "
        f"one that shares the first {choice.longest_B} and replaced its beginning by the prompt's"
      )
    self._decoder.report(message)
