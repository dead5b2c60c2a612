"""Policies of rematerialization: what the backward pass recomputes instead of keeping."""

from typing import Any, TypeVar

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from calm_jax import config, errors

# Activations that `named` keeps and `offload` moves to the host: expensive to recompute, and
# small compared to the inner widths.
NAMES = ("query", "key", "value", "attention", "mlp")

_policies = jax.checkpoint_policies

# One row per policy. None keeps everything that the backward pass needs.
POLICIES: dict[str, Any] = {
  "none": None,
  "dots": _policies.dots_with_no_batch_dims_saveable,
  "named": _policies.save_only_these_names(*NAMES),
  "full": _policies.nothing_saveable,
  "offload": _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(NAMES),
    offload_src="device",
    offload_dst="pinned_host",
  ),
}

Module = TypeVar("Module", bound=type[nn.Module])


def named(x: jax.Array, name: str) -> jax.Array:
  """Returns an activation marked with one of NAMES."""
  assert name in NAMES, name
  return checkpoint_name(x, name)


def wrapped(module: Module, kind: str, in_scan: bool = False) -> Module:
  """Returns a module class whose backward pass follows a policy.

  Args:
    kind: a row of POLICIES.
    in_scan: whether the module is the body of a scan. A scan's boundaries keep the compiler
      from undoing the recomputation.

  Raises:
    CalmError: for an unknown kind.
  """
  if kind not in POLICIES:
    raise errors.CalmError(f"execution.remat is {kind!r}: {config.nearest(kind, POLICIES)}")
  if kind == "none":
    return module
  return nn.remat(module, policy=POLICIES[kind], prevent_cse=not in_scan)


def recomputed(part: Any) -> Any:
  """Returns a module class, or a function of a module, that keeps only its inputs for the gradient.

  For parts without matrix products. A scan over layers stacks everything that is kept, which
  costs a write, a slice and a copy, in float32 where a norm computes in float32. Transformer-L
  moves 101 GB per chip and step on v6e:16x16 instead of 138.
  """
  return nn.remat(part, prevent_cse=False)
