"""What the backward pass recomputes in place of keeping it: one row a policy."""

from typing import Any, TypeVar

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from calm_jax import config, errors

# Activations that `named` keeps and `offload` moves to the host: what is dear to
# compute again, and small beside the inner widths.
NAMES = ("query", "key", "value", "attention", "mlp")

_policies = jax.checkpoint_policies

# None keeps all that the backward pass needs.
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
  """Marks an activation as one of NAMES."""
  assert name in NAMES, name
  return checkpoint_name(x, name)


def wrapped(module: Module, kind: str, in_scan: bool = False) -> Module:
  """Returns the module's class under a policy.

  Args:
    in_scan: whether it is the body of a loop, whose ends keep the compiler from
      undoing the recomputation.

  Raises:
    CalmError: for a kind that is no row of POLICIES.
  """
  if kind not in POLICIES:
    raise errors.CalmError(f"execution.remat is {kind!r}: {config.nearest(kind, POLICIES)}")
  if kind == "none":
    return module
  return nn.remat(module, policy=POLICIES[kind], prevent_cse=not in_scan)
