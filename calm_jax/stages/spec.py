"""What a stage is to everything else."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from calm_jax import config
from calm_jax.generation import writing as writing_lib
from calm_jax.interchange import export
from calm_jax.reporting import presentation
from calm_jax.training import stage, trained

Params = Any
Parents = Mapping[str, trained.Trained]
ParentRuns = Mapping[str, Any]
# What messages call each parent, and the flag that gives another one: by the parent's name.
Places = Mapping[str, tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Spec:
  """The description of a stage: acts, planning and benchmarks ask it, and know no stage's name.

  Attributes:
    run: class of its settings, whose `stage` has the stage's name as default.
    title: for messages, as "a CALM language model".
    parents: what it is trained on: name -> stage. The setting of that name is the parent's
      workdir. Parents are loaded, copied into the run's own workdir, and fingerprinted.
    patch_size: settings -> K, tokens a position.
    model: (settings, parents, vocabulary, dtype) -> its `trained.Model`.
    stage: (settings, model, parents) -> its functions for the loop.
    flops: (settings, parents' settings, vocabulary) -> training FLOPs a position of each part,
      as the paper counts them.
    program_flops: the same arguments -> training FLOPs a position that our program computes
      where nothing but attention is recomputed.
    presentation: how reports and model cards show it.
    check: (settings, parents' settings, vocabulary, places) -> None; raises CalmError where
      they don't fit each other. See `Places`.
    transformer: settings -> sizes of the Transformer over its positions; None for a stage
      without attention.
    unshaped: settings -> names of those in `model` and `head` that leave the shapes of
      parameters and their meaning as they are.
    samples: the setting that is the number of samples in evaluation; "" for none.
    source: (settings, store, parents, rows) -> a `data.pipeline.Source` of training batches;
      None for blocks of tokens.
    writing: how it writes text; None for a stage that writes none.
    writers: the formats it is exported to.
  """

  run: type[config.Run]
  title: str
  patch_size: Callable[[Any], int]
  model: Callable[[Any, Parents, int, Any], Any]
  stage: Callable[[Any, Any, Parents], stage.Stage]
  flops: Callable[[Any, ParentRuns, int], dict[str, float]]
  program_flops: Callable[[Any, ParentRuns, int], float]
  presentation: presentation.Presentation
  parents: Mapping[str, str] = dataclasses.field(default_factory=dict)
  check: Callable[[Any, ParentRuns, int, Places], None] = lambda *arguments: None
  transformer: Callable[[Any], config.Transformer | None] = lambda run: None
  unshaped: Callable[[Any], frozenset[str]] = lambda run: frozenset()
  samples: str = ""
  source: Callable[..., Any] | None = None
  writing: writing_lib.Writing | None = None
  writers: Mapping[str, export.Writer] = dataclasses.field(default_factory=dict)
