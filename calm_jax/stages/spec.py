"""The description of a stage, which acts, planning and benchmarks read."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from calm_jax import config
from calm_jax.data import pipeline
from calm_jax.generation import writing as writing_lib
from calm_jax.interchange import export
from calm_jax.reporting import presentation
from calm_jax.training import stage, trained

Params = Any
Parents = Mapping[str, trained.Trained]
ParentRuns = Mapping[str, Any]
# Parent's name -> (its description in messages, the flag that sets it).
ParentLabels = Mapping[str, tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Spec:
  """A stage of training. No other module branches on a stage's name; they read this instead.

  Attributes:
    run: class of its settings; the default of its `stage` is the stage's name.
    title: name in messages, such as "a CALM language model".
    parents: models that it is trained on: name -> stage. The setting with that name is the
      parent's workdir. Parents are loaded, copied into the run's workdir and fingerprinted.
    patch_size: settings -> K, tokens per position.
    model: (settings, parents, vocabulary, dtype) -> its `trained.Model`.
    stage: (settings, model, parents) -> its functions for the training loop.
    flops: (settings, settings of the parents and of theirs by name, vocabulary) -> training FLOPs
      per position of each part, as the paper counts them.
    program_flops: same arguments -> training FLOPs per position that our program computes if
      nothing but attention is recomputed.
    initial: (settings, model, parents) -> parameters to start from, arrays of their own; by default
      the model's initial values.
    continued: (model, parameters of the weights in `start_from`) -> parameters to start from; by
      default the same.
    presentation: how reports and model cards show it.
    check: (settings, parents' settings, vocabulary, labels) -> None; raises CalmError if they
      don't fit each other. See `ParentLabels`.
    transformer: settings -> sizes of the Transformer over its positions; None for a stage
      without attention.
    unshaped: settings -> names of the settings in `model` and `head` that change neither the
      shapes nor the meaning of parameters.
    samples: name of the setting that is the number of samples in evaluation; "" for none.
    fields: settings -> fields of an example of a training batch; by default those of a block.
    source: (settings, store, parents, rows) -> a `data.pipeline.Source` of training batches;
      None for blocks of tokens.
    writing: how it generates text; None for a stage that generates none.
    writers: format -> function that exports to it.
  """

  run: type[config.Run]
  title: str
  patch_size: Callable[[Any], int]
  model: Callable[[Any, Parents, int, Any], Any]
  stage: Callable[[Any, Any, Parents], stage.Stage]
  flops: Callable[[Any, ParentRuns, int], dict[str, float]]
  program_flops: Callable[[Any, ParentRuns, int], float]
  presentation: presentation.Presentation
  initial: Callable[[Any, Any, Parents], Params] | None = None
  continued: Callable[[Any, Params], Params] = lambda model, params: params
  parents: Mapping[str, str] = dataclasses.field(default_factory=dict)
  check: Callable[[Any, ParentRuns, int, ParentLabels], None] = lambda *arguments: None
  transformer: Callable[[Any], config.Transformer | None] = lambda run: None
  unshaped: Callable[[Any], frozenset[str]] = lambda run: frozenset()
  samples: str = ""
  fields: Callable[[Any], Mapping[str, pipeline.Field]] = lambda run: pipeline.fields(
    run.data.context
  )
  source: Callable[..., pipeline.Source] | None = None
  writing: writing_lib.Writing | None = None
  writers: Mapping[str, export.Writer] = dataclasses.field(default_factory=dict)
