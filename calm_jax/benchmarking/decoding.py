"""Speed of writing: the published way of drawing against ours, on a trained model."""

import dataclasses
import time
import typing
from typing import Any

import jax
import numpy as np
import scipy.special
import scipy.stats
from jax import numpy as jnp

from calm_jax import errors, workdir
from calm_jax.benchmarking import timing
from calm_jax.data import synthetic
from calm_jax.generation import (
  candidates,
  choosers,
  decode,
  laws,
  precision,
  requests,
  rules,
  tradeoff,
)
from calm_jax.models import calm, memory
from calm_jax.planning import writing

REPETITIONS = 9
PROMPT_PATCHES, NEW_PATCHES = 16, 16
BATCHES = (1, 4, 32)
PUBLISHED = requests.Sampler("none", "batch")
# Name, sampler, T, N.
WAYS = (
  ("one draw", PUBLISHED, 1.0, 1),
  ("published", PUBLISHED, 1 / 2, 200),
  ("ours", requests.Sampler(), 1 / 2, 24),
  ("published", PUBLISHED, 1 / 3, 200),
  ("ours", requests.Sampler(), 1 / 3, 24),
)
QUALITY_PATCHES = 1024
LAW, LAW_DRAWS = np.array([0.5, 0.3, 0.15, 0.05]), 100_000


def _bare(trained: workdir.TrainedCalm, token_BPK: np.ndarray) -> float:
  """Returns seconds of the shortest loop: one draw a patch, no machine around it."""
  model, params = trained.model, (trained.params, trained.autoencoder.params)
  law = laws.CalmLaw(trained, requests.Sampler())

  @jax.jit
  def prefill(params, token_BPK):
    return law.advance(params, token_BPK, None, memory.Cache.empty(64))

  @jax.jit
  def steps(params, state, key):
    def step(state, key):
      hidden_BD, cache = state
      latent_BZ = model.sample(params[0], hidden_BD, key, 1)[0]
      token_BK = calm.decode_tokens(model.autoencoder, params[1], latent_BZ)
      return law.advance(params, token_BK[:, None], None, cache), token_BK

    return jax.lax.scan(step, state, jax.random.split(key, NEW_PATCHES))[1]

  state = prefill(params, token_BPK)
  return timing.median_seconds(lambda: steps(params, state, jax.random.key(0)), REPETITIONS)


def _write(decoder: decode.Decoder, wishes: list[requests.Request]) -> tuple[float, float, float]:
  """Returns seconds of writing NEW_PATCHES, the prompt aside; draws made and seen a patch."""
  taken, drawn, seen = [], [], []
  for _ in range(REPETITIONS + 1):
    writing_now = decoder.start(wishes)
    jax.block_until_ready(writing_now.state)
    start = time.perf_counter()
    written = writing_now.advance(NEW_PATCHES)
    taken.append(time.perf_counter() - start)
    drawn += [x for text in written for x in text.drawn]
    seen += [x for text in written for x in text.seen]
  return float(np.median(taken[1:])), float(np.mean(drawn)), float(np.mean(seen))


def _batch_law(power: float, draws: int) -> np.ndarray:
  """Returns the batch rule's law on LAW, over all counts that so many draws can give."""
  grid = np.indices((draws + 1,) * (len(LAW) - 1)).reshape(len(LAW) - 1, -1).T
  grid = grid[grid.sum(axis=1) <= draws]
  count_CX = np.concatenate([grid, draws - grid.sum(axis=1, keepdims=True)], axis=1)
  gammaln = scipy.special.gammaln
  log_ways_C = gammaln(draws + 1) + (count_CX * np.log(LAW) - gammaln(count_CX + 1)).sum(axis=1)
  level_C1 = (power - np.maximum(int(power) - count_CX.max(axis=1), 0))[:, None]
  enough_CX = count_CX >= np.maximum(np.floor(level_C1), 1)
  safe_CX = np.where(enough_CX, count_CX, np.ceil(level_C1))
  weight_CX = np.exp(gammaln(safe_CX + 1) - gammaln(safe_CX - level_C1 + 1)) * enough_CX
  share_CX = weight_CX / weight_CX.sum(axis=1, keepdims=True)
  return (np.exp(log_ways_C)[:, None] * share_CX).sum(axis=0)


def _tempered(power: float) -> np.ndarray:
  return LAW**power / (LAW**power).sum()


def _biases() -> list[dict[str, Any]]:
  """Returns the total variation of the batch rule's law from the exact one, lower is better."""
  return [
    {
      "temperature": value,
      "num_candidates": n,
      "total_variation": float(abs(_batch_law(1 / value, n) - _tempered(1 / value)).sum() / 2),
    }
    for value in (0.7, 0.5, 0.4)
    for n in (10, 50, 200)
  ]


def _known_law(rule: rules.Rule, temperatures: tuple[float, ...]) -> dict[float, np.ndarray]:
  """Returns how often each outcome of LAW is drawn at each temperature."""
  rows = 1000

  def draw_of(key_B):
    def draw(row_S, number_S):
      key_S = candidates.keys_of(key_B[row_S], candidates.DRAW, number_S)
      x_S = jax.vmap(lambda key: jax.random.categorical(key, jnp.log(LAW)))(key_S)
      return candidates.Candidate(x_S[:, None].astype(jnp.int32), None)

    return draw

  @jax.jit
  def outcomes(key, power):
    ones_B = jnp.ones(rows, jnp.int32)
    key_B = jax.random.split(key, rows)
    wanted = candidates.Wanted(
      key_B, power * ones_B, 300 * ones_B, 300 * ones_B, 0 * ones_B[:, None], 0 * ones_B,
      ones_B > 0,
    )  # fmt: skip
    choice = candidates.choose(wanted, draw_of(key_B), rule, choosers.batch, 300, [rows, 2 * rows])
    return choice.patch.token_K[:, 0]

  found = {}
  for value in temperatures:
    batches = [outcomes(jax.random.key(i), 1 / value) for i in range(LAW_DRAWS // rows)]
    found[value] = np.bincount(np.concatenate(batches), minlength=len(LAW))
  return found


def _patches_that_differ(trained: workdir.TrainedCalm, token_BPK: jax.Array) -> dict[str, float]:
  """Returns, for smaller weights, the share of draws that differ with the same noise.

  It bounds the total variation of the laws. A kind whose library is missing is left out.
  """

  def drawn(one: workdir.TrainedCalm) -> np.ndarray:
    @jax.jit
    def tokens(params, frozen):
      hidden_BPD, _ = one.model.hidden(params, token_BPK)
      latent_NBPZ = one.model.sample(params, hidden_BPD, jax.random.key(0), 20)
      return calm.decode_tokens(one.model.autoencoder, frozen, latent_NBPZ)

    return np.asarray(tokens(one.params, one.autoencoder.params))

  found, whole = {}, drawn(trained)
  for kind, smaller in precision.WEIGHTS.items():
    try:
      small = drawn(typing.cast(workdir.TrainedCalm, smaller(trained)))
    except errors.CalmError:
      continue
    found[kind] = float(np.any(whole != small, axis=-1).mean())
  return found


def measure(directory: str) -> tuple[list[str], dict[str, Any]]:
  """Returns lines to be read, and the figures: tokens/s, higher is better.

  Args:
    directory: workdir of a CALM language model, trained on a store that is still there.

  Raises:
    CalmError: for any other.
  """
  if not directory:
    raise errors.CalmError(
      "--suite=decode writes with a trained model: give --workdir=DIR of a CALM language model, "
      "such as launch/quickstart.sh trains"
    )
  trained = workdir.load_calm(directory)
  store = synthetic.open_store(trained.run.data.path)
  workdir.require_same_tokenizer(trained.origin, store, directory)
  size = trained.model.autoencoder.sizes.patch_size
  lines, speeds = [], []
  # Nothing ends a text early.
  endless = dataclasses.replace(
    trained, origin=dataclasses.replace(trained.origin, appends_eos=False, start_patch=())
  )
  for batch in BATCHES:
    length = PROMPT_PATCHES * size
    places = np.linspace(0, store.num_tokens("heldout") - length, batch).astype(int)
    tokens = np.stack([store.read("heldout", i, i + length) for i in places]).astype(np.int32)
    count = batch * NEW_PATCHES * size
    bare = count / _bare(endless, tokens.reshape(batch, PROMPT_PATCHES, size))
    lines.append(f"batch {batch:2}  bare loop, T = 1, one draw: {bare:9,.1f} tokens/s")
    speeds.append(
      {"batch": batch, "way": "bare loop", "temperature": 1.0, "tokens_per_second": bare}
    )
    before = 0.0
    for name, sampler, value, n in WAYS:
      decoder = decode.Decoder(endless, sampler, lambda line: None)
      wishes = [
        requests.Request(tuple(row.tolist()), value, n, 4 * NEW_PATCHES * size, number=i)
        for i, row in enumerate(tokens)
      ]
      seconds, drawn, seen = _write(decoder, wishes)
      job = writing.Job(
        trained.run, trained.model.autoencoder.sizes, trained.origin.vocab_size,
        2 * (PROMPT_PATCHES + NEW_PATCHES // 2), draws=drawn, batch=batch,
      )  # fmt: skip
      found = {
        "batch": batch, "way": name, "temperature": value, "num_candidates": n,
        "sampler": f"{sampler.rule}:{sampler.at_limit}", "tokens_per_second": count / seconds,
        "draws": drawn, "seen": seen, "mflop": sum(x.flops for x in writing.parts(job)) / 1e6,
      }  # fmt: skip
      speeds.append(found)
      speed = found["tokens_per_second"]
      line = (
        f"batch {batch:2}  {name:10} T = {value:.3f}, N = {n:3}: {speed:9,.1f} tokens/s, "
        f"{drawn:6.1f} draws a patch, {found['mflop']:8.1f} MFLOP a token"
      )
      if name == "ours":
        line += f", {speed / before:.1f} times the published way"
      lines.append(line)
      before = speed
  quality = []
  for sampler, n in ((PUBLISHED, 200), (requests.Sampler(), 24)):
    quality += tradeoff.of_calm(
      trained, store, (1 / 2, 1 / 3), (n,), (sampler,), QUALITY_PATCHES, seed=0
    )
  for row in quality:
    told = [
      f"{name} " + " ".join(f"{x:.1f}" for x in row[name]) + f" (± {row[name + '_error'][0]:.1f})"
      for name in ("accuracy", "collision")
    ]
    lines.append(
      f"{row['rule']}:{row['at_limit']} T = {row['temperature']:.3f}, N = {row['num_candidates']}: "
      f"{', '.join(told)}, {row['draws']:.1f} draws"
    )
  differs = _patches_that_differ(endless, jnp.array(tokens.reshape(-1, PROMPT_PATCHES, size)))
  lines.append(
    "draws that differ with the same noise: "
    + ", ".join(f"{100 * share:.2f} % with {kind}" for kind, share in differs.items() if share)
  )
  biases = _biases()
  lines.append(
    "batch rule on a known law, total variation from the exact one: "
    + ", ".join(
      f"{one['total_variation']:.4f} at T = {one['temperature']}, N = {one['num_candidates']}"
      for one in biases
    )
  )
  raced = {
    f"{value:.3g}": float(abs(count_X / count_X.sum() - _tempered(1 / value)).sum() / 2)
    for value, count_X in _known_law(rules.first, (1 / 2, 1 / 3)).items()
  }
  lines.append(
    "first on that law: " + ", ".join(f"{x:.4f} at T = {value}" for value, x in raced.items())
  )
  exact = {
    f"{value:.3g}": float(
      scipy.stats.chisquare(count_X, _tempered(1 / value) * count_X.sum()).pvalue
    )
    for value, count_X in _known_law(rules.exact, (1.0, 0.7, 0.5, 1 / 3)).items()
  }
  lines.append(
    f"exact on that law, chi-square over {LAW_DRAWS:,} draws: "
    + ", ".join(f"p = {p:.3f} at T = {value}" for value, p in exact.items())
  )
  return lines, {
    "speeds": speeds,
    "quality": quality,
    "differing_draws": differs,
    "batch_bias": biases,
    "first_bias": raced,
    "exact_law_p": exact,
  }
