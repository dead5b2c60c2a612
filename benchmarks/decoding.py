"""Speed of generation with a trained model: the published sampler, and ours."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from benchmarks import known_law, timing
from calm_jax import errors, workdir
from calm_jax.data import store as store_lib
from calm_jax.data import synthetic
from calm_jax.generation import cost, decode, laws, precision, requests, rules
from calm_jax.models import calm, memory
from calm_jax.planning import writing
from calm_jax.running import loading
from calm_jax.running import texts as texts_lib
from calm_jax.stages import table
from calm_jax.training import trained as trained_lib

REPETITIONS = 9
PROMPT_PATCHES, NEW_PATCHES = 16, 16
BATCHES = (1, 4, 32)
PUBLISHED = requests.Sampler("none", "batch")
RACE, DIRECT = requests.Sampler(), requests.Sampler(rules.DIRECT)
# (name, sampler, T, N). Those with DIRECT need a tempered head.
WAYS: tuple[tuple[str, requests.Sampler, float, int], ...] = (
  ("one draw", PUBLISHED, 1.0, 1),
  ("published", PUBLISHED, 1 / 2, 200),
  ("race", RACE, 1 / 2, 24),
  ("direct", DIRECT, 1 / 2, 24),
  ("published", PUBLISHED, 1 / 3, 200),
  ("race", RACE, 1 / 3, 24),
  ("direct", DIRECT, 1 / 3, 24),
)
QUALITY_PATCHES = 1024

Section = tuple[list[str], Any]  # Lines to print, and the figures.


def _bare(trained: trained_lib.Trained, token_BPK: np.ndarray) -> float:
  """Returns seconds of NEW_PATCHES in a minimal loop: one draw per patch at T = 1."""
  model, params = trained.model, (trained.params, trained.parents["autoencoder"].params)
  law, autoencoder = laws.CalmLaw(trained, requests.Sampler()), trained.parents["autoencoder"].model

  @jax.jit
  def prefill(params, token_BPK):
    return law.advance(params, token_BPK, None, memory.Cache.empty(64))

  @jax.jit
  def steps(params, state, key):
    def step(state, key):
      hidden_BD, cache = state
      latent_BZ = model.sample(params[0], hidden_BD, key, 1)[0]
      token_BK = calm.decode_tokens(autoencoder, params[1], latent_BZ)
      return law.advance(params, token_BK[:, None], None, cache), token_BK

    return jax.lax.scan(step, state, jax.random.split(key, NEW_PATCHES))[1]

  state = prefill(params, token_BPK)
  return timing.median_seconds(lambda: steps(params, state, jax.random.key(0)), REPETITIONS)


def _write(decoder: decode.Decoder, texts: list[requests.Request]) -> tuple[float, float, float]:
  """Returns seconds of NEW_PATCHES without the prompt; draws per patch, all and those seen."""
  seconds, drawn, seen = [], [], []
  for _ in range(REPETITIONS + 1):
    session = decoder.start(texts)
    jax.block_until_ready(session.state)
    start = time.perf_counter()
    written = session.advance(NEW_PATCHES)
    seconds.append(time.perf_counter() - start)
    drawn += [x for text in written for x in text.drawn]
    seen += [x for text in written for x in text.seen]
  return float(np.median(seconds[1:])), float(np.mean(drawn)), float(np.mean(seen))


def _differing_draws(trained: trained_lib.Trained, token_BPK: np.ndarray) -> Section:
  """Measures, per kind of smaller weights, the share of draws that differ with the same noise.

  The share bounds the total variation between the distributions. A kind whose library is not
  installed is left out.
  """

  def draw_tokens(stage: trained_lib.Trained) -> np.ndarray:
    model, autoencoder = stage.model, stage.parents["autoencoder"]

    @jax.jit
    def tokens(params, frozen):
      hidden_BPD, _ = model.hidden(params, jnp.array(token_BPK))
      latent_NBPZ = model.sample(params, hidden_BPD, jax.random.key(0), 20)
      return calm.decode_tokens(autoencoder.model, frozen, latent_NBPZ)

    return np.asarray(tokens(stage.params, autoencoder.params))

  figures, expected = {}, draw_tokens(trained)
  for kind, convert in precision.WEIGHTS.items():
    try:
      tokens_BPK = draw_tokens(convert(trained))
    except errors.CalmError:
      continue
    figures[kind] = float(np.any(expected != tokens_BPK, axis=-1).mean())
  shares = (f"{100 * share:.2f} % with {kind}" for kind, share in figures.items() if share)
  return [f"draws that differ with the same noise: {', '.join(shares)}"], figures


def _prompts(store: store_lib.TokenStore, batch: int, patch_size: int) -> np.ndarray:
  """Returns prompts at even distances in the held-out tokens, [B, PROMPT_PATCHES, K]."""
  length = PROMPT_PATCHES * patch_size
  positions = np.linspace(0, store.num_tokens("heldout") - length, batch).astype(int)
  token_BS = np.stack([store.read("heldout", i, i + length) for i in positions]).astype(np.int32)
  return token_BS.reshape(batch, PROMPT_PATCHES, patch_size)


def _speed(
  trained: trained_lib.Trained, token_BPK: np.ndarray, way: tuple[str, requests.Sampler, float, int]
) -> dict[str, Any]:
  """Returns the speed and the cost of continuing each prompt in one of WAYS."""
  name, sampler, value, n = way
  batch, _, patch_size = token_BPK.shape
  texts = [
    requests.Request(tuple(row.tolist()), value, n, 4 * NEW_PATCHES * patch_size, number=i)
    for i, row in enumerate(token_BPK.reshape(batch, -1))
  ]
  seconds, drawn, seen = _write(texts_lib.decoder(trained, sampler, lambda line: None), texts)
  job = cost.WritingJob(
    trained.run,
    trained_lib.runs(trained.parents),
    trained.origin.vocab_size,
    2 * (PROMPT_PATCHES + NEW_PATCHES // 2),
    draws=drawn,
    batch=batch,
    is_direct=sampler == DIRECT,
  )
  return {
    "batch": batch,
    "way": name,
    "temperature": value,
    "num_candidates": n,
    "sampler": f"{sampler.rule}:{sampler.at_limit}",
    "tokens_per_second": batch * NEW_PATCHES * patch_size / seconds,
    "draws": drawn,
    "seen": seen,
    "mflop": sum(part.flops for part in writing.parts(job)) / 1e6,
  }


def _speeds(trained: trained_lib.Trained, token_BPK: np.ndarray) -> Section:
  """Measures the bare loop and all WAYS at one batch size, in turns."""
  batch, _, patch_size = token_BPK.shape
  bare = batch * NEW_PATCHES * patch_size / _bare(_language_model(trained), token_BPK)
  lines = [f"batch {batch:2}  bare loop, T = 1, one draw: {bare:9,.1f} tokens/s"]
  figures: list[dict[str, Any]] = [
    {"batch": batch, "way": "bare loop", "temperature": 1.0, "tokens_per_second": bare}
  ]
  for way in _ways(trained):
    row = _speed(trained, token_BPK, way)
    ratios = {
      name: row["tokens_per_second"] / other["tokens_per_second"]
      for other in figures
      if (name := other["way"]) != "bare loop" and other["temperature"] in (1, row["temperature"])
    }
    line = (
      f"batch {batch:2}  {row['way']:10} T = {row['temperature']:.3f}, N = "
      f"{row['num_candidates']:3}: {row['tokens_per_second']:9,.1f} tokens/s, "
      f"{row['draws']:6.1f} draws a patch, {row['mflop']:8.1f} MFLOP a token"
    )
    if ratios:
      line += "; " + ", ".join(f"{ratio:.2f} times {name}" for name, ratio in ratios.items())
    lines.append(line)
    figures.append(row)
  return lines, figures


def _quality(trained: trained_lib.Trained, store: store_lib.TokenStore) -> Section:
  """Measures accuracy and collision of the published sampler and of ours, in percent."""
  lines, figures = [], []
  settings = (trained, store, (1 / 2, 1 / 3))
  for samplers, n in (((DIRECT, RACE), 24), ((PUBLISHED,), 200)):
    own = [sampler for sampler in samplers if sampler != DIRECT or _is_tempered(trained)]
    how = texts_lib.require_writing(trained.run, "this is")
    figures += how.tradeoff(*settings, (n,), own, QUALITY_PATCHES, seed=0)
  for row in figures:
    scores = [
      f"{name} " + " ".join(f"{x:.1f}" for x in row[name]) + f" (± {row[name + '_error'][0]:.1f})"
      for name in ("accuracy", "collision")
    ]
    lines.append(
      f"{row['rule']}:{row['at_limit']} T = {row['temperature']:.3f}, N = {row['num_candidates']}: "
      f"{', '.join(scores)}, {row['draws']:.1f} draws"
    )
  return lines, figures


def _is_tempered(trained: trained_lib.Trained) -> bool:
  return texts_lib.require_writing(trained.run, "this is").rule == rules.DIRECT


def _language_model(trained: trained_lib.Trained) -> trained_lib.Trained:
  """Returns the language model, which a tempered head has as its parent."""
  return trained.parents["calm"] if _is_tempered(trained) else trained


def _ways(trained: trained_lib.Trained) -> list[tuple[str, requests.Sampler, float, int]]:
  return [way for way in WAYS if way[1] != DIRECT or _is_tempered(trained)]


def _trained(directory: str) -> trained_lib.Trained:
  """Returns the model of --workdir.

  Raises:
    CalmError: if there is none.
  """
  if not directory:
    raise errors.CalmError(
      "--suite=decode needs a trained model: give --workdir=DIR of a CALM language model, "
      "such as launch/quickstart.sh trains"
    )
  trained = loading.load(directory)
  if not texts_lib.require_writing(trained.run, f"{directory} holds").takes_candidates:
    raise errors.CalmError(
      f"{directory} holds {table.of(trained.run).title}: --suite=decode is for CALM language models"
    )
  return trained


def measure(directory: str) -> tuple[list[str], dict[str, Any]]:
  """Returns lines to print, and the figures: tokens/s, higher is better.

  Args:
    directory: workdir of a CALM language model, whose token store must still be there.

  Raises:
    CalmError: for any other folder.
  """
  trained = _trained(directory)
  store = synthetic.open_store(trained.run.data.path)
  workdir.require_same_tokenizer(trained.origin, store, directory)
  endless = dataclasses.replace(  # No text ends early.
    trained, origin=dataclasses.replace(trained.origin, appends_eos=False, start_patch=())
  )
  patch_size = table.of(trained.run).patch_size(trained.run)
  prompts = [_prompts(store, batch, patch_size) for batch in BATCHES]
  speeds = [_speeds(endless, token_BPK) for token_BPK in prompts]
  sections: dict[str, Section] = {
    "speeds": ([x for lines, _ in speeds for x in lines], [x for _, rows in speeds for x in rows]),
    "quality": _quality(trained, store),
    "differing_draws": _differing_draws(_language_model(endless), prompts[-1]),
    "batch_bias": known_law.batch_bias(),
    "first_bias": known_law.first_bias(),
    "tempered_head": known_law.tempered_head(),
    "exact_law_p": known_law.exact_law(),
  }
  lines = [line for own, _ in sections.values() for line in own]
  return lines, {name: figures for name, (_, figures) in sections.items()}
