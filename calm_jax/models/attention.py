"""Causal attention of all positions to those before them: one row a kernel."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

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


def _ranges(positions: int) -> list[tuple[int, int]]:
  block = max(QUERIES, -(-positions // BLOCKS))
  return [(start, min(start + block, positions)) for start in range(0, positions, block)]


def _rows(x_BHqC: jax.Array, groups: int) -> jax.Array:
  """The queries of all heads of a group as rows of one product, [B, G, r, C]."""
  return x_BHqC.reshape(x_BHqC.shape[0], groups, -1, x_BHqC.shape[3])


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _of_blocks(query_BHPC: jax.Array, key_BGPC: jax.Array, value_BGPC: jax.Array) -> jax.Array:
  return _of_blocks_forward(query_BHPC, key_BGPC, value_BGPC)[0]


def _of_blocks_forward(query_BHPC, key_BGPC, value_BGPC):
  groups, found, kept = key_BGPC.shape[1], [], []
  for start, end in _ranges(query_BHPC.shape[2]):
    query_BGrC = _rows(query_BHPC[:, :, start:end], groups)
    score_BGrk = _product("bgrc,bgkc->bgrk", query_BGrC, key_BGPC[:, :, :end])
    seen_qk = jnp.arange(end)[None] <= jnp.arange(start, end)[:, None]
    seen_rk = jnp.tile(seen_qk, (query_BGrC.shape[2] // (end - start), 1))
    score_BGrk = jnp.where(seen_rk, score_BGrk, -jnp.inf)
    weight_BGrk = jnp.exp(score_BGrk - jnp.max(score_BGrk, axis=-1, keepdims=True))
    sum_BGr1 = jnp.sum(weight_BGrk, axis=-1, keepdims=True)
    weight_BGrk = weight_BGrk.astype(value_BGPC.dtype)
    y_BGrC = _product("bgrk,bgkc->bgrc", weight_BGrk, value_BGPC[:, :, :end]) / sum_BGr1
    found.append(y_BGrC.astype(value_BGPC.dtype).reshape(*query_BHPC.shape[:2], end - start, -1))
    kept.append((weight_BGrk, sum_BGr1))
  y_BHPC = jnp.concatenate(found, axis=2)
  return y_BHPC, (query_BHPC, key_BGPC, value_BGPC, y_BHPC, kept)


def _of_blocks_backward(known, slope_BHPC):
  query_BHPC, key_BGPC, value_BGPC, y_BHPC, kept = known
  dtype, (_, groups, positions, _) = key_BGPC.dtype, key_BGPC.shape
  of_query, of_key_BGPC, of_value_BGPC = [], jnp.zeros(()), jnp.zeros(())
  for (start, end), (weight_BGrk, sum_BGr1) in zip(_ranges(positions), kept, strict=True):
    query_BGrC, y_BGrC, slope_BGrC = (
      _rows(x[:, :, start:end], groups) for x in (query_BHPC, y_BHPC, slope_BHPC)
    )
    slope_BGrC = slope_BGrC / sum_BGr1
    mean_BGr1 = jnp.sum(slope_BGrC * y_BGrC, axis=-1, keepdims=True)
    slope_BGrC = slope_BGrC.astype(dtype)
    of_weight_BGrk = _product("bgrc,bgkc->bgrk", slope_BGrC, value_BGPC[:, :, :end])
    of_score_BGrk = (weight_BGrk * (of_weight_BGrk - mean_BGr1)).astype(dtype)
    of_query_BGrC = _product("bgrk,bgkc->bgrc", of_score_BGrk, key_BGPC[:, :, :end])
    of_query.append(of_query_BGrC.reshape(*query_BHPC.shape[:2], end - start, -1))
    unread = ((0, 0), (0, 0), (0, positions - end), (0, 0))
    of_key_BGkC = _product("bgrk,bgrc->bgkc", of_score_BGrk, query_BGrC)
    of_key_BGPC += jnp.pad(of_key_BGkC, unread)
    of_value_BGPC += jnp.pad(_product("bgrk,bgrc->bgkc", weight_BGrk, slope_BGrC), unread)
  of_query_BHPC = jnp.concatenate(of_query, axis=2)
  return tuple(x.astype(dtype) for x in (of_query_BHPC, of_key_BGPC, of_value_BGPC))


_of_blocks.defvjp(_of_blocks_forward, _of_blocks_backward)


def _blocks(query_BPHC: jax.Array, key_BPGC: jax.Array, value_BPGC: jax.Array) -> jax.Array:
  """Blocks of queries, each with the keys up to its end: little more than the causal half.

  For the gradient softmax's exponentials are kept, and not the weights: what is read is divided
  by their sum, which is fewer numbers.
  """
  query_BPHC = query_BPHC * query_BPHC.shape[-1] ** -0.5
  given = (x.swapaxes(1, 2) for x in (query_BPHC, key_BPGC, value_BPGC))
  return _of_blocks(*given).swapaxes(1, 2)


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
    unfit: what of (positions, mesh sizes, type) it can't do, empty for nothing.
  """

  run: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  platforms: tuple[str, ...]
  unfit: Callable[[int, Any, jnp.dtype], str] = lambda positions, parts, dtype: ""


def _splash_unfit(positions: int, parts: Any, dtype: jnp.dtype) -> str:
  own = _own(positions, parts)
  return "" if own % LANES == 0 else f"it needs a multiple of {LANES} positions a device, not {own}"


def _divided_unfit(positions: int, parts: Any, dtype: jnp.dtype) -> str:
  return "" if parts["sequence"] == 1 else "it can't divide positions (config.mesh.sequence)"


def _cudnn_unfit(positions: int, parts: Any, dtype: jnp.dtype) -> str:
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"it computes in bfloat16 or float16, not {dtype.name}"
  return _divided_unfit(positions, parts, dtype)


# In the order in which `auto` tries them.
KERNELS: dict[str, Kernel] = {
  "splash": Kernel(_splash, ("tpu",), _splash_unfit),
  "cudnn": Kernel(_cudnn, ("cuda", "gpu"), _cudnn_unfit),
  "blocks": Kernel(_blocks, ("cpu",), _divided_unfit),
  "xla": Kernel(_xla, ("tpu", "cuda", "gpu", "rocm", "cpu")),
}


def choose(kind: str, positions: int, dtype: DTypeLike, platform: str = "") -> str:
  """Returns the row of KERNELS that computes attention, `kind` itself unless it is `auto`.

  Args:
    kind: a row of KERNELS, or `auto`.
    positions: of a text.
    dtype: what is computed in.
    platform: by default that of the devices of the mesh that is set, which may be ones that
      a program is only compiled for, else that of this process.

  Raises:
    CalmError: for an unknown kind, or one that can't be used here: it is not replaced.
  """
  mesh, dtype = jax.sharding.get_abstract_mesh(), jnp.dtype(dtype)
  platform = platform or mesh_lib.platform()
  parts = {"sequence": 1, "tensor": 1} if mesh.empty else mesh.shape
  if kind == "auto":
    return next(
      name
      for name, kernel in KERNELS.items()
      if platform in kernel.platforms and not kernel.unfit(positions, parts, dtype)
    )
  if kind not in KERNELS:
    known = config.nearest(kind, ["auto", *KERNELS])
    raise errors.CalmError(f"execution.attention is {kind!r}: {known}")
  kernel = KERNELS[kind]
  reason = kernel.unfit(positions, parts, dtype)
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
