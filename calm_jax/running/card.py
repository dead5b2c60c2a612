"""A trained stage -> the tokenizer and the model card of an exported folder."""

import pathlib
import shutil
from collections.abc import Sequence

import jax

import calm_jax
from calm_jax import figures, files, workdir
from calm_jax.data import tokenizer as tokenizer_lib
from calm_jax.reporting import presentation as presentation_lib
from calm_jax.reporting import records, tables
from calm_jax.training import trained as trained_lib

# File ending of a tokenizer -> the name under which loaders look for it.
_TOKENIZER_NAMES = {".json": "tokenizer.json", ".model": "tokenizer.model"}


def write(
  folder: pathlib.Path,
  trained: trained_lib.Trained,
  source: str,
  use: str,
  presentation: presentation_lib.Presentation,
) -> None:
  """Writes tokenizer and card into an exported folder.

  Args:
    source: the workdir.
    use: Markdown on how to open the folder.
    presentation: how the stage is shown.
  """
  tokenizer = workdir.tokenizer(source, trained.origin)
  ending = pathlib.PurePath(tokenizer.path).suffix
  shutil.copyfile(tokenizer.path, folder / _TOKENIZER_NAMES[ending])
  if ending == ".json":
    eos = tokenizer.piece(tokenizer.eos_id)
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    files.write(folder / "tokenizer_config.json", files.to_json(values))
  files.write(folder / "README.md", card(trained, source, tokenizer, use, presentation))


def card(
  trained: trained_lib.Trained,
  source: str,
  tokenizer: tokenizer_lib.Tokenizer,
  use: str,
  presentation: presentation_lib.Presentation,
) -> str:
  """Returns the model card: what the model is, how to open it, and its evaluation."""
  run, origin = trained.run, trained.origin
  settings = tables.settings(run, presentation.settings)
  facts = [
    ("parameters", f"{_count(trained):,}"),
    *((f"parameters of {name}", f"{_count(parent):,}") for name, parent in trained.parents.items()),
    ("vocabulary", f"{origin.vocab_size:,}"),
    ("steps trained", f"{trained.step:,}" if origin.store_hash else "imported"),
    ("EOS", f"token {origin.eos_id}, {tokenizer.piece(origin.eos_id)!r}"),
    ("documents begin after", f"tokens {list(origin.start_patch)}" if origin.start_patch else "-"),
    *((name, value) for name, value in settings if _describes_model(name)),
    *presentation.facts(run, trained_lib.runs(trained.parents)),
  ]
  return f"""---
tags: [calm]
---
# {presentation.title}
Continuous autoregressive language models, [arXiv:2510.27688](https://arxiv.org/abs/2510.27688).
Written by calm_jax {calm_jax.__version__}; float32.

{use}

## Model
{_table(("", ""), facts)}

## Measured
{_measured(presentation.figures, source)}
"""


def _count(trained: trained_lib.Trained) -> int:
  return sum(x.size for x in jax.tree.leaves(trained.params))


def _describes_model(name: str) -> bool:
  return name.startswith(("model.", "head.")) or name == "data.context"


def _measured(scores: Sequence[figures.Figure], source: str) -> str:
  """Returns the evaluation of a workdir as Markdown: a table and its conditions."""
  values = records.read_evaluation(source)
  if values is None:
    return "Nothing yet: this folder was exported before its model was evaluated."
  rows = [
    (label, value, f"{unit}; {direction}")
    for label, value, unit, direction in tables.evaluation(scores, values)
  ]
  portable = {name: value for name, value in values.items() if name != "data"}  # A local path.
  conditions = ", ".join(f"{name} {value}" for name, value in tables.conditions(portable))
  return f"{_table(('figure', 'value ± standard error', ''), rows)}\n\n{conditions}"


def _table(heading: tuple[str, ...], rows) -> str:
  lines = [heading, ("---",) * len(heading), *rows]
  return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in lines)
