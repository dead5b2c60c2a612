"""Evaluates a trained stage on held-out text: `python -m calm_jax.evaluate --workdir=W`.

Prints the figures as JSON and writes them to the workdir's evaluation.json. They depend on
the context length and on N, which are stored with them. `--temperatures` scores generated
continuations instead and writes temperature.json.
"""

from typing import Any

import jax
from absl import flags
from etils import epath

from calm_jax import cli, config, distributed, errors, files, run_flags, workdir
from calm_jax.data import pipeline, synthetic
from calm_jax.data import store as store_lib
from calm_jax.generation import requests, writing
from calm_jax.objectives import brier
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.running import evaluating, loading
from calm_jax.stages import table
from calm_jax.training import evaluation

run_flags.define_processes()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run of any stage.")
_DATA = flags.DEFINE_string("data", "", "Token store; by default that of the training run.")
_CONTEXT = flags.DEFINE_integer("context", 0, "Tokens per block; by default as in training.", 0)
_BLOCKS = flags.DEFINE_integer("blocks", 0, "Held-out blocks to use; 0 for all.", 0)
_SAMPLES = flags.DEFINE_integer(
  "samples", 0, "N, samples per patch of CALM; by default as in training.", 0
)
_BATCH = flags.DEFINE_integer("batch", 16, "Blocks scored at once.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all noise.", 0, 2**32 - 1)

_TEMPERATURES = flags.DEFINE_list(
  "temperatures",
  [],
  "Score generated continuations at these temperatures, for each of --samplers and "
  "--num_candidates, instead of the model: accuracy, collision and draws.",
)
_NUM_CANDIDATES = flags.DEFINE_list(
  "num_candidates", ["32"], "Values of N to combine with --temperatures."
)
_SAMPLERS = flags.DEFINE_list(
  "samplers",
  [],
  "RULE or RULE:AT_LIMIT as in generate, to combine with --temperatures; none:batch is the "
  "published sampler. By default first:prefix, and direct before it if the workdir has a tempered "
  "head.",
)
_PATCHES = flags.DEFINE_integer("patches", 512, "Patches to score, with --temperatures.", 1)
_BASELINE = flags.DEFINE_string(
  "baseline", "", "Workdir of a Transformer to compare with, with --temperatures."
)

# The unconditional distribution is estimated from at most this many training tokens.
MARGINAL_TOKENS = 50_000_000


def _marginal(store: store_lib.TokenStore, figures: dict[str, Any], size: int) -> dict[str, float]:
  """Returns BrierLM of a model that ignores the context, on the patches that were scored."""
  train = store.read("train", 0, min(store.num_tokens("train"), MARGINAL_TOKENS))
  blocks = pipeline.heldout_tokens(store, figures["context_tokens"], figures["blocks"])
  heldout = brier.grams(blocks, size)[:, 1:]
  return brier.marginal(brier.grams(train, size), heldout.reshape(-1, brier.ORDERS))


def _store(directory: str) -> store_lib.TokenStore:
  """Returns the store of --data, by default that of the run; CalmError if it does not fit."""
  run, origin = loading.read_run(directory), workdir.read_origin(directory)
  config.require(
    bool(_DATA.value or run.data.path),
    f"{directory} does not name the token store it was trained on: give --data=DIR, written by "
    "calm_jax.prepare",
  )
  store = synthetic.open_store(_DATA.value or run.data.path)
  pipeline.require_heldout(store, ", and give that store with --data")
  workdir.require_same_tokenizer(origin, store, directory)
  return store


def evaluate(directory: str) -> dict[str, Any]:
  """Returns the figures of a workdir's newest checkpoint on held-out text.

  Raises:
    CalmError: for a workdir, store or context that do not fit each other.
  """
  run, store = loading.read_run(directory), _store(directory)
  context = _CONTEXT.value or run.data.context
  config.require(
    bool(table.of(run).samples) or not _SAMPLES.value,
    f"--samples={_SAMPLES.value} is for CALM language models; {directory} holds stage "
    f"{run.stage!r}",
  )
  with jax.set_mesh(mesh_lib.build(config.Mesh())):
    return _figures(directory, store, context)


def _figures(directory: str, store: store_lib.TokenStore, context: int) -> dict[str, Any]:
  # Fails on a context longer than the text, before a program is built for it.
  batch = min(_BATCH.value, len(pipeline.Blocks(store, "heldout", context)))
  trained = loading.load(directory)
  stage, conditions = evaluating.functions(trained, _SAMPLES.value)
  size = table.of(trained.run).patch_size(trained.run)
  evaluation.require_context(context, size, "--context")
  evaluator = evaluation.Evaluator(stage, store, context, batch, _BLOCKS.value, _SEED.value)
  scores = evaluator(trained.params)
  assert scores is not None  # It is None only if a stop was requested.
  figures = {"stage": trained.run.stage, "step": trained.step, **scores, **conditions}
  if "brier_lm" in figures:
    figures |= _marginal(store, figures, size)
  return {**figures, "data": _DATA.value or trained.run.data.path, "store_hash": store.hash}


def _numbers(flag: flags.FlagHolder, kind: type) -> list[Any]:
  """Returns the values of a list flag as numbers; CalmError if one is not a number."""
  try:
    return [kind(value) for value in flag.value]
  except ValueError as error:
    raise errors.CalmError(f"--{flag.name} is not a list of numbers: {error}") from error


def _tradeoff(directory: str) -> dict[str, Any]:
  """Returns the scores of generated continuations at each temperature."""
  for pair in _SAMPLERS.value:
    config.require(
      pair.count(":") < 2 and not pair.endswith(f":{requests.ERROR}"),
      f"--samplers has {pair!r}: give RULE or RULE:AT_LIMIT, such as first:prefix",
    )
  spec, store = table.of(loading.read_run(directory)), _store(directory)
  temperatures, candidates = _numbers(_TEMPERATURES, float), _numbers(_NUM_CANDIDATES, int)
  if spec.writing is None:
    raise errors.CalmError(f"{spec.title} generates no text: temperatures are for language models")
  names = _SAMPLERS.value or dict.fromkeys((spec.writing.rule, requests.Sampler.rule))
  samplers = [_sampler(name) for name in names]
  baseline = _exact_writing(_BASELINE.value, store) if _BASELINE.value else None
  settings = (temperatures, candidates, samplers, _PATCHES.value, _SEED.value)
  trained = loading.load(directory)
  figures = {
    "stage": trained.run.stage,
    "step": trained.step,
    "context_tokens": trained.run.data.context,
    "seed": _SEED.value,
    "store_hash": store.hash,
    "rows": spec.writing.tradeoff(trained, store, *settings),
  }
  if baseline:
    figures["baseline"] = baseline.tradeoff(loading.load(_BASELINE.value), store, *settings)
  return figures


def _sampler(name: str) -> requests.Sampler:
  """Returns the sampler that RULE or RULE:AT_LIMIT names."""
  rule, _, at_limit = name.partition(":")
  return requests.Sampler(rule, at_limit or requests.Sampler.at_limit)


def _exact_writing(directory: str, store: store_lib.TokenStore) -> writing.Writing:
  """Returns how the baseline writes text; CalmError if it can't be compared on `store`."""
  workdir.require_same_tokenizer(workdir.read_origin(directory), store, directory)
  spec = table.of(loading.read_run(directory))
  if spec.writing is None or spec.writing.takes_candidates:
    raise errors.CalmError(
      f"--baseline={directory} holds {spec.title}: give the workdir of a stage that samples "
      "exactly at any temperature, such as a Transformer"
    )
  return spec.writing


def main() -> None:
  if not _WORKDIR.value:
    raise errors.CalmError("give --workdir=DIR, the folder of a training run")
  distributed.initialize(run_flags.processes())
  if _TEMPERATURES.value:
    name, figures = workdir.TRADEOFF, _tradeoff(_WORKDIR.value)
  else:
    name, figures = workdir.EVALUATION, files.finite(evaluate(_WORKDIR.value))
  text = files.to_json(figures)
  if distributed.is_first():
    print(text, end="", flush=True)
    files.write(epath.Path(_WORKDIR.value) / name, text)


if __name__ == "__main__":
  cli.run(main)
