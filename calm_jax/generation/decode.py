"""Prompts -> patches: a batch of texts written by one compiled loop."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from calm_jax import errors
from calm_jax.generation import candidates, laws, requests
from calm_jax.models import memory
from calm_jax.parallel import mesh
from calm_jax.training import trained as trained_lib

# A prompt's tail must be met by chance: so many candidates before giving up, in units of N, and
# at least this N.
TAIL_ROUNDS, TAIL_CANDIDATES = 8, 256
# Prompts are filled up to lengths of this times a power of two, so that few programs are compiled.
PROMPT_PATCHES = 8
# Rings longer than this have a multiple of it in slots: a TPU reads others in another order than
# it keeps them in, and copies them to and fro.
LANES = 128


class Asked(NamedTuple):
  """The requests of a batch as arrays.

  Attributes:
    first: what the first patches are to be, tails of the prompts with them; later ones
      differ in the key and have no tail.
  """

  first: candidates.Wanted
  max_tokens_B: jax.Array


def asked(
  wishes: Sequence[requests.Request],
  power: Sequence[float],
  tails: Sequence[Any],
  patch_size: int,
) -> Asked:
  """Returns a batch's requests as arrays, given 1/T of each and the tokens of its tail."""
  limit = [wish.num_candidates if s != 1 else 1 for s, wish in zip(power, wishes, strict=True)]
  tail_BK = np.zeros((len(wishes), patch_size), np.int32)
  for row, tail in enumerate(tails):
    tail_BK[row, : len(tail)] = tail
  seeds = np.array([wish.seed for wish in wishes], np.uint32)
  numbers = np.array([wish.number for wish in wishes], np.int32)

  def whole(values: Sequence[int]) -> jax.Array:
    return jnp.array(values, jnp.int32)

  first = candidates.Wanted(
    key_B=jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(seeds, numbers),
    power_B=jnp.array(power, jnp.float32),
    limit_B=whole(limit),
    attempts_B=whole([TAIL_ROUNDS * max(n, TAIL_CANDIDATES) for n in limit]),
    tail_BK=jnp.array(tail_BK),
    length_B=whole([len(tail) for tail in tails]),
    active_B=jnp.ones((len(wishes),), bool),
  )
  return Asked(first, whole([wish.max_tokens for wish in wishes]))


class _State(NamedTuple):
  """Where the texts stand.

  Attributes:
    hidden_BD: what predicts the next patch. cache: a `memory.Cache`.
    patch: the number of the next one. written_B: new tokens before it.
    done_B: whether nothing more is wanted.
  """

  hidden_BD: jax.Array
  cache: Any
  done_B: jax.Array
  written_B: jax.Array
  patch: jax.Array


@dataclasses.dataclass
class Written:
  """What came of one text by some steps of the loop.

  Attributes:
    tokens: new ones. ended: whether it is whole.
    drawn, seen: candidates of each patch, made and seen by the rule. settled: whether the rule
      settled, a patch each; else the draws ended before.
  """

  tokens: list[int] = dataclasses.field(default_factory=list)
  ended: bool = False
  drawn: list[int] = dataclasses.field(default_factory=list)
  seen: list[int] = dataclasses.field(default_factory=list)
  settled: list[bool] = dataclasses.field(default_factory=list)


class Decoder:
  """Writes texts with one trained model.

  The last `window` patches, as many as an example showed the model in training,
  are kept in a ring; older ones are forgotten, so texts have no longest length.
  """

  def __init__(
    self,
    trained: trained_lib.Trained,
    law: laws.Law,
    sampler: requests.Sampler,
    report: Callable[[str], None],
  ):
    """Takes a trained stage and its law, which follows the same sampler."""
    self.law = law
    self.origin, self.sampler, self.report = trained.origin, sampler, report
    self.window = trained.run.data.context // self.law.patch_size - 1
    self.prefill = jax.jit(self._prefill, static_argnames="slots")
    self.steps = jax.jit(
      self._steps, static_argnames=("slots", "sizes", "count"), donate_argnames="state"
    )

  def _prefill(self, params, token_BPK, start_B, max_tokens_B, key_B, slots: int) -> _State:
    """Reads whole patches, those before an example's start aside."""
    zeros_B = jnp.zeros_like(start_B)
    own_B = candidates.keys_of(key_B, candidates.POSTERIOR, zeros_B)
    latent_BPZ = self.law.latents(params, token_BPK, own_B)
    cache = memory.Cache.empty(slots, start_B, min(slots, self.window))
    hidden_BD, cache = self.law.advance(params, token_BPK, latent_BPZ, cache)
    return _State(hidden_BD, cache, max_tokens_B < 1, zeros_B, jnp.int32(0))

  def _steps(
    self, params, asked: Asked, state: _State, slots: int, sizes: tuple[int, ...], count: int
  ) -> tuple[_State, candidates.Choice]:
    """Writes up to `count` patches of every text; returns also each patch's choice, [T, B, ...].

    What it returns of patches after a text's end means nothing.
    """

    def step(state: _State) -> tuple[_State, candidates.Choice]:
      first = asked.first
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
      done_B = state.done_B | (written_B >= asked.max_tokens_B)
      if self.origin.appends_eos:
        done_B |= jnp.any((token_BK == self.origin.eos_id) & new_BK, axis=1)
      latent_B1Z = None if latent_BZ is None else latent_BZ[:, None]
      hidden_BD, cache = self.law.advance(params, token_BK[:, None], latent_B1Z, state.cache)
      return _State(hidden_BD, cache, done_B, written_B, state.patch + 1), choice

    def again(carry):
      done, state, found = carry
      state, choice = step(state)
      found = jax.tree.map(lambda x, new: x.at[done].set(new), found, choice)
      return done + 1, state, found

    def wanted(carry):
      done, state, _ = carry
      return (done < count) & ~jnp.all(state.done_B)

    _, choice = jax.eval_shape(step, state)
    found = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), choice)
    _, state, found = jax.lax.while_loop(wanted, again, (jnp.int32(0), state, found))
    # Latents stay where they are needed.
    return state, found._replace(patch=found.patch._replace(latent_Z=None))

  def start(self, wishes: Sequence[requests.Request]) -> "Writing":
    """Reads the prompts of a batch; see `Writing`.

    Raises:
      CalmError: for a request that can't be met, or a prompt too short for a model that
        knows no start of a document.
    """
    return Writing(self, wishes)


def _placed(tree: Any) -> Any:
  """Returns arrays of rows over the mesh, whole on each device where it can't divide them."""
  current = mesh.current()
  rows = jax.tree.leaves(tree)[0].shape[0]
  spec = mesh.spec("batch") if rows % mesh.row_parts(current) == 0 else mesh.spec()
  return jax.device_put(tree, jax.sharding.NamedSharding(current, spec))


def ring(patches: int) -> int:
  """Returns the slots for so many patches."""
  return patches if patches <= LANES else -(-patches // LANES) * LANES


def _bucket(size: int, largest: int) -> int:
  """Returns the least of PROMPT_PATCHES, twice that, ... that holds `size`."""
  bucket = PROMPT_PATCHES
  while bucket < size:
    bucket *= 2
  return min(bucket, largest)


class Writing:
  """A batch of texts in the making: `advance` until all have ended.

  Attributes:
    state: where they stand, on the devices.
  """

  def __init__(self, decoder: Decoder, wishes: Sequence[requests.Request]):
    self._decoder, self._wishes, law = decoder, list(wishes), decoder.law
    power = [law.power(wish) for wish in wishes]
    token_BPK, start_B, tails = self._aligned(
      [self._prompt(number) for number in range(len(wishes))]
    )
    self._asked = _placed(asked(wishes, power, tails, law.patch_size))
    self._tails = [len(tail) for tail in tails]
    limit = np.asarray(self._asked.first.limit_B).tolist()
    least = max(law.least(*both) for both in zip(power, limit, strict=True))
    self._slots = max(limit)
    self._sizes = tuple(candidates.round_sizes(len(wishes), least, self._slots))
    patches = token_BPK.shape[1] + max(-(-wish.max_tokens // law.patch_size) for wish in wishes)
    self.state = decoder.prefill(
      law.params, _placed(token_BPK), _placed(start_B), self._asked.max_tokens_B,
      self._asked.first.key_B,
      slots=ring(_bucket(patches, decoder.window)),
    )  # fmt: skip
    self._ended = [False] * len(wishes)
    self._count = [0] * len(wishes)
    self._patch = 0

  def _name(self, row: int) -> str:
    return f"text {row + 1}: " if len(self._wishes) > 1 else ""

  def _prompt(self, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a prompt's whole patches that the model sees, [P, K], and its tail."""
    decoder, size = self._decoder, self._decoder.law.patch_size
    start = decoder.origin.start_patch
    known = np.array([*start, *self._wishes[row].prompt], np.int32)
    whole = len(known) // size
    if not whole:
      raise errors.CalmError(
        f"{self._name(row)}the prompt has {len(known)} tokens, and imported weights know no start "
        f"of a document: give a prompt of at least a patch, {size} tokens"
      )
    if whole > decoder.window:
      decoder.report(
        f"{self._name(row)}the prompt has {whole - bool(start)} patches; the model sees the last "
        f"{decoder.window}, as many as an example had in training"
      )
    return known[: whole * size].reshape(whole, size)[-decoder.window :], known[whole * size :]

  def _aligned(self, prompts):
    """Returns prompts [B, P, K] that end together, where each begins, and their tails."""
    decoder = self._decoder
    longest = max(len(whole_PK) for whole_PK, _ in prompts)
    patches = _bucket(longest, decoder.window)
    token_BPK = np.zeros((len(prompts), patches, decoder.law.patch_size), np.int32)
    for row, (whole_PK, _) in enumerate(prompts):
      token_BPK[row, patches - len(whole_PK) :] = whole_PK
    start_B = np.array([patches - len(whole_PK) for whole_PK, _ in prompts], np.int32)
    return token_BPK, start_B, [tail for _, tail in prompts]

  @property
  def done(self) -> bool:
    """Whether all texts have ended."""
    return all(self._ended)

  def end(self, row: int) -> None:
    """Ends a text: nothing more of it is wanted."""
    self._ended[row] = True
    self.state = self.state._replace(done_B=self.state.done_B.at[row].set(True))

  def advance(self, count: int) -> list[Written]:
    """Returns what up to `count` patches add to each text.

    Raises:
      CalmError: where draws end before a rule settles, if that is asked for.
    """
    decoder = self._decoder
    self.state, found = decoder.steps(
      decoder.law.params, self._asked, self.state,
      slots=self._slots, sizes=self._sizes, count=count,
    )  # fmt: skip
    found = jax.device_get(found)
    written = [
      self._row(row, jax.tree.map(lambda x, row=row: x[:, row], found))
      for row in range(len(self._wishes))
    ]
    self._patch += count
    return written

  def _row(self, row: int, found: candidates.Choice) -> Written:
    wish, written = self._wishes[row], Written(ended=self._ended[row])
    tail = self._tails[row] if self._patch == 0 else 0
    eos = self._decoder.origin.eos_id if self._decoder.origin.appends_eos else None
    for patch, token_K in enumerate(found.patch.token_K):
      if written.ended:
        break
      if tail:
        self._tell_tail(row, jax.tree.map(lambda x: x[0], found), tail)
      new = token_K[tail:].tolist()[: wish.max_tokens - self._count[row]]
      tail = 0
      if eos in new:
        new, written.ended = new[: new.index(eos)], True
      self._count[row] += len(new)
      written.ended |= self._count[row] >= wish.max_tokens
      written.tokens += new
      written.drawn.append(int(found.drawn_B[patch]))
      written.seen.append(int(found.seen_B[patch]))
      written.settled.append(bool(found.settled_B[patch]))
      if not written.settled[-1] and self._decoder.sampler.at_limit == requests.ERROR:
        raise errors.CalmError(
          f"{self._name(row)}patch {self._patch + patch + 1} is not settled after "
          f"{written.seen[-1]} draws at temperature {wish.temperature}: raise num_candidates, or "
          "take --at_limit=batch"
        )
    self._ended[row] = written.ended
    return written

  def _tell_tail(self, row: int, choice: candidates.Choice, tail: int) -> None:
    size = self._decoder.law.patch_size
    told = f"{self._name(row)}the prompt ends inside a patch: "
    if choice.agreed_B:
      told += (
        f"{choice.agreed_B} of {choice.drawn_B} candidates begin with its last {tail} of {size} "
        "tokens"
      )
    else:
      told += (
        f"none of {choice.drawn_B} candidates begins with its last {tail} of {size} tokens; took "
        f"one that shares the first {choice.longest_B} and put the prompt's in their place"
      )
    self._decoder.report(told)
