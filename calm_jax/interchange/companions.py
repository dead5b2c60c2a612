"""What lies beside exported weights: the tokenizer, and a card that tells what they are."""

import pathlib
import shutil

import jax

import calm_jax
from calm_jax import files, workdir
from calm_jax.data import tokenizer as tokenizer_lib
from calm_jax.reporting import records, tables

_TITLES = {
  "autoencoder": "CALM autoencoder",
  "calm": "CALM language model",
  "transformer": "Transformer baseline of CALM",
}
# Names under which loaders look for a tokenizer, by what kind of file it is.
_TOKENIZER_NAMES = {".json": "tokenizer.json", ".model": "tokenizer.model"}


def write(folder: pathlib.Path, trained: workdir.Trained, source: str, use: str) -> None:
  """Writes tokenizer and card into an exported folder.

  Args:
    source: the workdir.
    use: Markdown on how the folder is opened.
  """
  tokenizer = workdir.tokenizer(source, trained.origin)
  ending = pathlib.PurePath(tokenizer.path).suffix
  shutil.copyfile(tokenizer.path, folder / _TOKENIZER_NAMES[ending])
  if ending == ".json":
    eos = tokenizer.piece(tokenizer.eos_id)
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    files.write(folder / "tokenizer_config.json", files.to_json(values))
  files.write(folder / "README.md", card(trained, source, tokenizer, use))


def card(
  trained: workdir.Trained, source: str, tokenizer: tokenizer_lib.Tokenizer, use: str
) -> str:
  """Returns the model card: what it is, how it is opened, what was measured."""
  run, origin = trained.run, trained.origin
  count = sum(x.size for x in jax.tree.leaves(trained.params))
  facts = [
    ("parameters", f"{count:,}"),
    ("vocabulary", f"{origin.vocab_size:,}"),
    ("steps trained", f"{trained.step:,}" if origin.store_hash else "imported"),
    ("EOS", f"token {origin.eos_id}, {tokenizer.piece(origin.eos_id)!r}"),
    ("documents begin after", f"tokens {list(origin.start_patch)}" if origin.start_patch else "-"),
    *((name, value) for name, value in tables.settings(run) if _describes_model(name)),
  ]
  if isinstance(trained, workdir.TrainedCalm):
    codec = trained.autoencoder.run.model
    facts += [("K, tokens a patch", codec.patch_size), ("latent", codec.latent)]
  return f"""---
tags: [calm]
---
# {_TITLES[run.stage]}
Continuous autoregressive language models, [arXiv:2510.27688](https://arxiv.org/abs/2510.27688).
Written by calm_jax {calm_jax.__version__}; float32.

{use}

## Model
{_table(("", ""), facts)}

## Measured
{_measured(run.stage, source)}
"""


def _describes_model(name: str) -> bool:
  return name.startswith(("model.", "head.")) or name == "data.context"


def _measured(stage: str, source: str) -> str:
  figures = records.read_evaluation(source)
  if figures is None:
    return "Nothing yet: this folder was exported before its model was evaluated."
  rows = [
    (label, value, f"{unit}; {direction}")
    for label, value, unit, direction in tables.evaluation(stage, figures)
  ]
  shown = {name: value for name, value in figures.items() if name != "data"}  # A local path.
  conditions = ", ".join(f"{name} {value}" for name, value in tables.conditions(shown))
  return f"{_table(('figure', 'value ± standard error', ''), rows)}\n\n{conditions}"


def _table(heading: tuple[str, ...], rows) -> str:
  lines = [heading, ("---",) * len(heading), *rows]
  return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in lines)
