"""Causal attention of all positions to those before them: one row a kernel."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from calm_jax import config, errors
from calm_jax.parallel import mesh as mesh_lib

# Positions that the TPU kernel works on at once: a multiple of LANES, at most BLOCK.
BLOCK, LANES = 512, 128

# Blocks of queries at most, as a program holds each of them, and the queries of one at least.
BLOCKS, QUERIES = 16, 64

_ALONG = ("batch", "position", "width", None)


def _xla(query_BPHC: jax.Array, key_BPGC: jax.Array, value_BPGC: jax.Array) -> jax.Array:
  whole = ("batch", None, "width", None)  # A device's queries read the keys of all positions.
  key_BPGC, value_BPGC = (mesh_lib.constrain(x, *whole) for x in (key_BPGC, value_BPGC))
  return jax.nn.dot_product_attention(
    query_BPHC, key_BPGC, value_BPGC, is_causal=True, implementation="xla"
  )


def _blocks(query_BPHC: jax.Array, key_BPGC: jax.Array, value_BPGC: jax.Array) -> jax.Array:
  """Blocks of queries, each with the keys up to its end: little more than the causal half."""
  batch, positions, _, channels = query_BPHC.shape
  groups, block = key_BPGC.shape[2], max(QUERIES, -(-positions // BLOCKS))
  query_BHPC, key_BGPC, value_BGPC = (x.swapaxes(1, 2) for x in (query_BPHC, key_BPGC, value_BPGC))

  # For the gradient softmax's exponentials are kept, and not each block's own copy of keys and
  # values. (A name on the weights would keep them, and compute the scores again.)
  @functools.partial(
    jax.checkpoint,
    policy=lambda primitive, *_, **__: primitive is jax.lax.exp_p,
    prevent_cse=False,
    static_argnums=(0, 1),
  )
  def attend(start, end, query_BHPC, key_BGPC, value_BGPC):
    # The queries of all heads of a group are rows of one product, "r".
    query_BGrC = query_BHPC[:, :, start:end].reshape(batch, groups, -1, channels) * channels**-0.5
    score_BGrk = jnp.einsum(
      "bgrc,bgkc->bgrk", query_BGrC, key_BGPC[:, :, :end], preferred_element_type=jnp.float32
    )
    seen_qk = jnp.arange(end)[None] <= jnp.arange(start, end)[:, None]
    seen_rk = jnp.tile(seen_qk, (query_BGrC.shape[2] // (end - start), 1))
    weight_BGrk = jax.nn.softmax(jnp.where(seen_rk, score_BGrk, -jnp.inf)).astype(value_BGPC.dtype)
    y_BGrC = jnp.einsum("bgrk,bgkc->bgrc", weight_BGrk, value_BGPC[:, :, :end])
    return y_BGrC.reshape(batch, -1, end - start, channels)

  found = [
    attend(start, min(start + block, positions), query_BHPC, key_BGPC, value_BGPC)
    for start in range(0, positions, block)
  ]
  return jnp.concatenate(found, axis=2).swapaxes(1, 2)


def _cudnn(query_BPHC: jax.Array, key_BPGC: jax.Array, value_BPGC: jax.Array) -> jax.Array:
  return jax.nn.dot_product_attention(
    query_BPHC, key_BPGC, value_BPGC, is_causal=True, implementation="cudnn"
  )


def _splash(
  query_BPHC: jax.Array, key_BPGC: jax.Array, value_BPGC: jax.Array, interpret: bool = False
) -> jax.Array:
  """Splash attention, each device on its own examples, heads and queries."""
  # Here: the import loads libtpu where there is one, and a profiler of CPUs then fails.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  _, positions, heads, channels = query_BPHC.shape
  mesh = jax.sharding.get_abstract_mesh()
  parts = {"sequence": 1, "tensor": 1} if mesh.empty else mesh.shape
  block = _block(positions, parts)
  sizes = splash.BlockSizes(
    block_q=block, block_kv=block, block_kv_compute=block,
    block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
    use_fused_bwd_kernel=True,
  )  # fmt: skip
  mask = masks.CausalMask((positions, positions), shard_count=parts["sequence"])
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([mask] * heads),
    block_sizes=sizes,
    head_shards=parts["tensor"],
    q_seq_shards=parts["sequence"],
    interpret=interpret,
  )

  def one_device(kernel, query_BPHC, key_BPGC, value_BPGC):
    # The kernel takes an example's [heads, positions, channels], queries scaled.
    arrays = (x.swapaxes(1, 2) for x in (query_BPHC * channels**-0.5, key_BPGC, value_BPGC))
    return jax.vmap(kernel)(*arrays).swapaxes(1, 2)

  if mesh.empty:
    return one_device(kernel, query_BPHC, key_BPGC, value_BPGC)
  divided = NamedSharding(mesh, PartitionSpec("tensor", "sequence"))
  kernel_spec = kernel.manual_sharding_spec(divided)
  own, whole = mesh_lib.spec(*_ALONG), mesh_lib.spec("batch", None, "width", None)
  every_device = jax.shard_map(
    one_device, in_specs=(kernel_spec, own, whole, whole), out_specs=own, check_vma=False
  )
  return every_device(kernel, query_BPHC, key_BPGC, value_BPGC)


def _own(positions: int, parts: Any) -> int:
  return positions // parts["sequence"]


def _block(positions: int, parts: Any) -> int:
  """Returns the positions that the TPU kernel works on at once."""
  return max(size for size in range(LANES, BLOCK + 1, LANES) if _own(positions, parts) % size == 0)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A way to compute it.

  Attributes:
    run: (query [B, P, H, C], key and value [B, P, G, C]) -> [B, P, H, C].
    platforms: where it runs.
    unfit: what of (positions, mesh sizes) it can't do, empty for nothing.
  """

  run: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  platforms: tuple[str, ...]
  unfit: Callable[[int, Any], str] = lambda positions, parts: ""


def _splash_unfit(positions: int, parts: Any) -> str:
  own = _own(positions, parts)
  return "" if own % LANES == 0 else f"it needs a multiple of {LANES} positions a device, not {own}"


def _divided_unfit(positions: int, parts: Any) -> str:
  return "" if parts["sequence"] == 1 else "it can't divide positions (config.mesh.sequence)"


# In the order in which `auto` tries them.
KERNELS: dict[str, Kernel] = {
  "splash": Kernel(_splash, ("tpu",), _splash_unfit),
  "cudnn": Kernel(_cudnn, ("cuda", "gpu"), _divided_unfit),
  "blocks": Kernel(_blocks, ("cpu",), _divided_unfit),
  "xla": Kernel(_xla, ("tpu", "cuda", "gpu", "rocm", "cpu")),
}


def choose(kind: str, positions: int, platform: str = "") -> str:
  """Returns the row of KERNELS that computes attention, `kind` itself unless it is `auto`.

  The mesh is the one that is set. `platform` is by default that of its devices, which may
  be ones that a program is only compiled for, else that of this process.

  Raises:
    CalmError: for an unknown kind, or one that can't be used here: it is not replaced.
  """
  mesh = jax.sharding.get_abstract_mesh()
  platform = platform or mesh_lib.platform()
  parts = {"sequence": 1, "tensor": 1} if mesh.empty else mesh.shape
  if kind == "auto":
    return next(
      name
      for name, kernel in KERNELS.items()
      if platform in kernel.platforms and not kernel.unfit(positions, parts)
    )
  if kind not in KERNELS:
    known = config.nearest(kind, ["auto", *KERNELS])
    raise errors.CalmError(f"execution.attention is {kind!r}: {known}")
  kernel = KERNELS[kind]
  reason = kernel.unfit(positions, parts)
  if platform not in kernel.platforms:
    reason = f"it runs on {' and '.join(kernel.platforms)}, and this is {platform}"
  if reason:
    raise errors.CalmError(f"execution.attention={kind} can't be used: {reason}; auto chooses")
  return kind


# Products of positions with positions that a kernel computes, by the start of its name in a
# program: scores and outputs forward; scores again and four gradients backward.
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = _PRODUCTS.values()


def products(kernel: str) -> int:
  """Returns how many products a kernel of a compiled program computes, 0 for another's."""
  return next((count for name, count in _PRODUCTS.items() if kernel.startswith(name)), 0)


def product_flops(examples: int, positions: int, width: int) -> float:
  """Returns the FLOPs of one product of one layer, the causal half of it; see `padding`."""
  return examples * positions * positions * width


def padding(positions: int, channels: int, parts: Any) -> float:
  """Returns by which factor a TPU's kernel computes more than `product_flops`.

  It computes whole blocks where the diagonal cuts them, and fills a head's channels up to
  LANES.
  """
  lanes = -(-channels // LANES) * LANES
  return (1 + _block(positions, parts) / positions) * lanes / channels


def causal(
  query_BPHC: jax.Array, key_BPGC: jax.Array, value_BPGC: jax.Array, kind: str
) -> jax.Array:
  """Returns what P positions read of each other, [B, P, H, C].

  Args:
    kind: see `choose`. Query heads in groups share the G keys and values.
  """
  along = (mesh_lib.constrain(x, *_ALONG) for x in (query_BPHC, key_BPGC, value_BPGC))
  return KERNELS[kind].run(*along)
