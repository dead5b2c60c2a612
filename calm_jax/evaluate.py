"""The act of measuring: `python -m calm_jax.evaluate --workdir=W`.

Prints the figures of held-out text as JSON and writes them into the workdir's
evaluation.json. They depend on the context length and on N: both are in it. With
`--temperatures` it scores what is written at them, into temperature.json.
"""

from typing import Any

import jax
from absl import flags
from etils import epath

from calm_jax import cli, config, distributed, errors, files, run_flags, workdir
from calm_jax.data import pipeline, synthetic
from calm_jax.data import store as store_lib
from calm_jax.generation import requests
from calm_jax.objectives import brier
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.running import evaluating, loading
from calm_jax.stages import table
from calm_jax.training import evaluation

run_flags.define_processes()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run of any stage.")
_DATA = flags.DEFINE_string("data", "", "Token store; by default the one trained on.")
_CONTEXT = flags.DEFINE_integer("context", 0, "Tokens a block; by default as in training.", 0)
_BLOCKS = flags.DEFINE_integer("blocks", 0, "Held-out blocks to use; 0 for all.", 0)
_SAMPLES = flags.DEFINE_integer(
  "samples", 0, "N, samples a patch of CALM; by default as in training.", 0
)
_BATCH = flags.DEFINE_integer("batch", 16, "Blocks worked on at once.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of all noise.", 0, 2**32 - 1)

_TEMPERATURES = flags.DEFINE_list(
  "temperatures",
  [],
  "Score in place of the model its continuations at these temperatures, by --samplers and "
  "--num_candidates: accuracy, collision and draws.",
)
_NUM_CANDIDATES = flags.DEFINE_list("num_candidates", ["32"], "N, each with --temperatures.")
_SAMPLERS = flags.DEFINE_list(
  "samplers",
  ["first:prefix"],
  "RULE:AT_LIMIT as for generate, each with --temperatures; none:batch is the published one.",
)
_PATCHES = flags.DEFINE_integer("patches", 512, "Patches to score, with --temperatures.", 1)
_BASELINE = flags.DEFINE_string(
  "baseline", "", "Workdir of a Transformer whose figures stand beside them, with --temperatures."
)

# The unconditional law is read off at most this many training tokens.
MARGINAL_TOKENS = 50_000_000


def _marginal(store: store_lib.TokenStore, figures: dict[str, Any], size: int) -> dict[str, float]:
  """BrierLM of the law that ignores the context, on the patches that were scored."""
  train = store.read("train", 0, min(store.num_tokens("train"), MARGINAL_TOKENS))
  blocks = pipeline.heldout_tokens(store, figures["context_tokens"], figures["blocks"])
  heldout = brier.grams(blocks, size)[:, 1:]
  return brier.marginal(brier.grams(train, size), heldout.reshape(-1, brier.ORDERS))


def _store(directory: str) -> store_lib.TokenStore:
  run, origin = loading.read_run(directory), workdir.read_origin(directory)
  config.require(
    bool(_DATA.value or run.data.path),
    f"{directory} was trained on no token store of ours: give --data=DIR, written by "
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
  # A context that is longer than the text is told before a program is built for it.
  batch = min(_BATCH.value, len(pipeline.Blocks(store, "heldout", context)))
  trained = loading.load(directory)
  stage, conditions = evaluating.functions(trained, _SAMPLES.value)
  size = table.of(trained.run).patch_size(trained.run)
  evaluation.require_context(context, size, "--context")
  evaluator = evaluation.Evaluator(stage, store, context, batch, _BLOCKS.value, _SEED.value)
  scores = evaluator(trained.params)
  assert scores is not None  # Nothing stops it.
  figures = {"stage": trained.run.stage, "step": trained.step, **scores, **conditions}
  if "brier_lm" in figures:
    figures |= _marginal(store, figures, size)
  return {**figures, "data": _DATA.value or trained.run.data.path, "store_hash": store.hash}


def _numbers(flag: flags.FlagHolder, kind: type) -> list[Any]:
  try:
    return [kind(value) for value in flag.value]
  except ValueError as error:
    raise errors.CalmError(f"--{flag.name} is no list of numbers: {error}") from error


def _tradeoff(directory: str) -> dict[str, Any]:
  """Returns what continuations score at each temperature."""
  for pair in _SAMPLERS.value:
    config.require(
      pair.count(":") == 1 and not pair.endswith(f":{requests.ERROR}"),
      f"--samplers has {pair!r}: give RULE:AT_LIMIT, as first:prefix",
    )
  samplers = [requests.Sampler(*pair.split(":")) for pair in _SAMPLERS.value]
  store = _store(directory)
  temperatures, numbers = _numbers(_TEMPERATURES, float), _numbers(_NUM_CANDIDATES, int)
  trained = loading.load(directory)
  spec = table.of(trained.run)
  if spec.writing is None:
    raise errors.CalmError(f"{spec.title} writes no text: temperatures are for language models")
  settings = (temperatures, numbers, samplers, _PATCHES.value, _SEED.value)
  rows = spec.writing.tradeoff(trained, store, *settings)
  figures = {
    "stage": trained.run.stage, "step": trained.step, "context_tokens": trained.run.data.context,
    "seed": _SEED.value, "store_hash": store.hash, "rows": rows,
  }  # fmt: skip
  if _BASELINE.value:
    workdir.require_same_tokenizer(workdir.read_origin(_BASELINE.value), store, _BASELINE.value)
    baseline = loading.load(_BASELINE.value)
    law = table.of(baseline.run).writing
    if law is None or law.takes_candidates:
      raise errors.CalmError(
        f"--baseline={_BASELINE.value} holds {table.of(baseline.run).title}: give a workdir whose "
        "laws are exact, as the Transformer's"
      )
    figures["baseline"] = law.tradeoff(baseline, store, *settings)
  return figures


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
