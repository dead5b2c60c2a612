"""Settings of any stage -> training FLOPs per token."""

from collections.abc import Mapping
from typing import Any

from calm_jax.stages import table


def train_parts(run: Any, parents: Mapping[str, Any], vocab_size: int) -> dict[str, float]:
  """Returns training FLOPs per token of each part, as the paper counts them.

  Args:
    parents: settings of each parent's run, by the parent's name.
  """
  spec = table.of(run)
  parts = spec.flops(run, parents, vocab_size)
  return {name: value / spec.patch_size(run) for name, value in parts.items()}


def train_per_token(run: Any, parents: Mapping[str, Any], vocab_size: int) -> float:
  """Returns training FLOPs per token; see `train_parts`."""
  return sum(train_parts(run, parents, vocab_size).values())


def program_per_token(run: Any, parents: Mapping[str, Any], vocab_size: int) -> float:
  """Returns FLOPs per token that our program computes if only the attention kernel recomputes.

  This differs from `train_per_token`, the published count, in two ways. The reference computes
  the head's part of the hidden state once per sample, our program once. The attention kernel's
  backward pass has five products instead of four.
  """
  spec = table.of(run)
  return spec.program_flops(run, parents, vocab_size) / spec.patch_size(run)
