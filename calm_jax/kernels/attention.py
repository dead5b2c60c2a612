"""Causal attention: query, key, value -> output, [B, P, H, C].

`KERNELS` has the plain implementation, `xla`, and one per platform; `choose` selects one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from calm_jax import config, errors
from calm_jax.parallel import mesh as mesh_lib

# Block size of the TPU kernel: at most BLOCK positions, a multiple of LANES.
BLOCK, LANES = 512, 128

# The CPU implementation unrolls at most BLOCKS blocks of at least QUERIES queries.
BLOCKS, QUERIES = 16, 64

_BY_POSITION = ("batch", "position", "width", None)
_ALL_POSITIONS = ("batch", None, "width", None)  # A device's queries read all keys and values.


def plain(query_BPHC: jax.Array, key_BPGC: jax.Array, value_BPGC: jax.Array) -> jax.Array:
  """Returns softmax(query · key / √C) · value over positions up to the query's, [B, P, H, C]."""
  key_BPGC, value_BPGC = (mesh_lib.constrain(x, *_ALL_POSITIONS) for x in (key_BPGC, value_BPGC))
  return jax.nn.dot_product_attention(
    query_BPHC, key_BPGC, value_BPGC, is_causal=True, implementation="xla"
  )


def _blockwise(query_BPHC: jax.Array, key_BPGC: jax.Array, value_BPGC: jax.Array) -> jax.Array:
  """Attention for CPUs: each block of queries reads only the keys up to its end.

  That skips about half of the scores. The custom gradient saves the unnormalized softmax weights,
  so that no product is recomputed, and normalizes the output instead of the weights.

  On 2 cores a Transformer's step takes 777 ms instead of 1,036 with plain attention. Value and
  gradient of a layer take 47 ms for 8 texts of 512 positions and 4 heads (57 with JAX's gradient,
  42 with PyTorch's kernel), and 136 ms for 2,048 positions and 8 heads (248 with JAX's gradient).
  """
  query_BPHC = query_BPHC * query_BPHC.shape[-1] ** -0.5
  by_head = (x.swapaxes(1, 2) for x in (query_BPHC, key_BPGC, value_BPGC))
  return _blocks(*by_head).swapaxes(1, 2)


# Axes of a block: q queries, p positions up to the block's end, r rows of a matrix product, which
# are the queries of all heads of a group. With a separate axis for heads: 62 ms instead of 33.
@jax.custom_vjp
def _blocks(query_BHPC: jax.Array, key_BGPC: jax.Array, value_BGPC: jax.Array) -> jax.Array:
  return _blocks_forward(query_BHPC, key_BGPC, value_BGPC)[0]


def _blocks_forward(query_BHPC, key_BGPC, value_BGPC):
  groups, outputs, weights = key_BGPC.shape[1], [], []
  for start, end in _ranges(query_BHPC.shape[2]):
    query_BGrC = _rows(query_BHPC[:, :, start:end], groups)
    score_BGrp = _product("BGrC,BGpC->BGrp", query_BGrC, key_BGPC[:, :, :end])
    is_seen_qp = jnp.arange(end)[None] <= jnp.arange(start, end)[:, None]
    is_seen_rp = jnp.tile(is_seen_qp, (query_BGrC.shape[2] // (end - start), 1))
    score_BGrp = jnp.where(is_seen_rp, score_BGrp, -jnp.inf)
    weight_BGrp = jnp.exp(score_BGrp - jnp.max(score_BGrp, axis=-1, keepdims=True))
    sum_BGr1 = jnp.sum(weight_BGrp, axis=-1, keepdims=True)
    weight_BGrp = weight_BGrp.astype(value_BGPC.dtype)
    y_BGrC = _product("BGrp,BGpC->BGrC", weight_BGrp, value_BGPC[:, :, :end]) / sum_BGr1
    outputs.append(y_BGrC.astype(value_BGPC.dtype).reshape(*query_BHPC.shape[:2], end - start, -1))
    weights.append((weight_BGrp, sum_BGr1))
  y_BHPC = jnp.concatenate(outputs, axis=2)
  return y_BHPC, (query_BHPC, key_BGPC, value_BGPC, y_BHPC, weights)


def _blocks_backward(residuals, grad_BHPC):
  query_BHPC, key_BGPC, value_BGPC, y_BHPC, weights = residuals
  dtype, (_, groups, positions, _) = key_BGPC.dtype, key_BGPC.shape
  grad_query, grad_key_BGPC, grad_value_BGPC = [], jnp.zeros(()), jnp.zeros(())
  for (start, end), (weight_BGrp, sum_BGr1) in zip(_ranges(positions), weights, strict=True):
    query_BGrC, y_BGrC, grad_BGrC = (
      _rows(x[:, :, start:end], groups) for x in (query_BHPC, y_BHPC, grad_BHPC)
    )
    grad_BGrC = grad_BGrC / sum_BGr1
    mean_BGr1 = jnp.sum(grad_BGrC * y_BGrC, axis=-1, keepdims=True)
    grad_BGrC = grad_BGrC.astype(dtype)
    grad_weight_BGrp = _product("BGrC,BGpC->BGrp", grad_BGrC, value_BGPC[:, :, :end])
    grad_score_BGrp = (weight_BGrp * (grad_weight_BGrp - mean_BGr1)).astype(dtype)
    grad_query_BGrC = _product("BGrp,BGpC->BGrC", grad_score_BGrp, key_BGPC[:, :, :end])
    grad_query.append(grad_query_BGrC.reshape(*query_BHPC.shape[:2], end - start, -1))
    pad_width = ((0, 0), (0, 0), (0, positions - end), (0, 0))
    grad_key_BGpC = _product("BGrp,BGrC->BGpC", grad_score_BGrp, query_BGrC)
    grad_key_BGPC += jnp.pad(grad_key_BGpC, pad_width)
    grad_value_BGpC = _product("BGrp,BGrC->BGpC", weight_BGrp, grad_BGrC)
    grad_value_BGPC += jnp.pad(grad_value_BGpC, pad_width)
  grad_query_BHPC = jnp.concatenate(grad_query, axis=2)
  return tuple(x.astype(dtype) for x in (grad_query_BHPC, grad_key_BGPC, grad_value_BGPC))


_blocks.defvjp(_blocks_forward, _blocks_backward)

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _ranges(positions: int) -> list[tuple[int, int]]:
  """Returns [start, end) of each block of queries."""
  block = max(QUERIES, -(-positions // BLOCKS))
  return [(start, min(start + block, positions)) for start in range(0, positions, block)]


def _rows(x_BHqC: jax.Array, groups: int) -> jax.Array:
  """Returns the queries of all heads of a group as rows, [B, G, r, C]."""
  return x_BHqC.reshape(x_BHqC.shape[0], groups, -1, x_BHqC.shape[3])


def _cudnn(query_BPHC: jax.Array, key_BPGC: jax.Array, value_BPGC: jax.Array) -> jax.Array:
  """Attention for NVIDIA GPUs: cuDNN's flash attention, without an array of scores [B, H, P, P].

  CALM-M's step of 65,536 tokens takes 128 ms and 26.9 GiB on an H200.
  """
  return jax.nn.dot_product_attention(
    query_BPHC, key_BPGC, value_BPGC, is_causal=True, implementation="cudnn"
  )


def _splash(
  query_BPHC: jax.Array, key_BPGC: jax.Array, value_BPGC: jax.Array, interpret: bool = False
) -> jax.Array:
  """Attention for TPUs: splash attention; each device computes its own examples, heads and queries.

  Transformer-M compiled for v5e:16x16 needs 6.4 GiB per chip instead of 29.2 with plain attention,
  and moves 85 GB per step instead of 272.
  """
  # Imported here because it loads libtpu if installed, and a CPU profiler then fails.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  _, positions, heads, channels = query_BPHC.shape
  mesh, sizes = jax.sharding.get_abstract_mesh(), _mesh_sizes()
  forward = ("block_q", "block_kv", "block_kv_compute")
  backward = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
  blocks = dict.fromkeys((*forward, *backward), _block(positions, sizes))
  mask = masks.CausalMask((positions, positions), shard_count=sizes["sequence"])
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([mask] * heads),
    block_sizes=splash.BlockSizes(**blocks, use_fused_bwd_kernel=True),
    head_shards=sizes["tensor"],
    q_seq_shards=sizes["sequence"],
    interpret=interpret,
  )

  def one_device(kernel, query_BPHC, key_BPGC, value_BPGC):
    # The kernel takes [heads, positions, channels] of one example, queries scaled.
    arrays = (x.swapaxes(1, 2) for x in (query_BPHC * channels**-0.5, key_BPGC, value_BPGC))
    return jax.vmap(kernel)(*arrays).swapaxes(1, 2)

  if mesh.empty:
    return one_device(kernel, query_BPHC, key_BPGC, value_BPGC)
  kernel_spec = kernel.manual_sharding_spec(
    NamedSharding(mesh, PartitionSpec("tensor", "sequence"))
  )
  own, replicated = mesh_lib.spec(*_BY_POSITION), mesh_lib.spec(*_ALL_POSITIONS)
  sharded = jax.shard_map(
    one_device, in_specs=(kernel_spec, own, replicated, replicated), out_specs=own, check_vma=False
  )
  return sharded(kernel, query_BPHC, key_BPGC, value_BPGC)


Sizes = Mapping[str, int]  # Axis of the mesh -> its size.


def _mesh_sizes() -> Sizes:
  mesh = jax.sharding.get_abstract_mesh()
  return {"sequence": 1, "tensor": 1} if mesh.empty else mesh.shape


def _own_positions(positions: int, sizes: Sizes) -> int:
  """Returns the number of positions of one device."""
  return positions // sizes["sequence"]


def _block(positions: int, sizes: Sizes) -> int:
  """Returns the block size of the TPU kernel, in positions."""
  own = _own_positions(positions, sizes)
  return max(size for size in range(LANES, BLOCK + 1, LANES) if own % size == 0)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """An implementation of attention.

  Attributes:
    run: (query [B, P, H, C], key and value [B, P, G, C]) -> [B, P, H, C].
    platforms: the platforms that it runs on.
    obstacle: (positions, mesh sizes, type) -> why it can't compute them, empty if it can.
  """

  run: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  platforms: tuple[str, ...]
  obstacle: Callable[[int, Sizes, jnp.dtype], str] = lambda positions, sizes, dtype: ""


def _splash_obstacle(positions: int, sizes: Sizes, dtype: jnp.dtype) -> str:
  own = _own_positions(positions, sizes)
  return (
    "" if own % LANES == 0 else f"it needs a multiple of {LANES} positions per device, not {own}"
  )


def _sequence_obstacle(positions: int, sizes: Sizes, dtype: jnp.dtype) -> str:
  return "" if sizes["sequence"] == 1 else "it can't divide positions (config.mesh.sequence)"


def _cudnn_obstacle(positions: int, sizes: Sizes, dtype: jnp.dtype) -> str:
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"it computes in bfloat16 or float16, not {dtype.name}"
  return _sequence_obstacle(positions, sizes, dtype)


# In the order in which `auto` tries them.
KERNELS: dict[str, Kernel] = {
  "splash": Kernel(_splash, ("tpu",), _splash_obstacle),
  "cudnn": Kernel(_cudnn, ("cuda", "gpu"), _cudnn_obstacle),
  "blocks": Kernel(_blockwise, ("cpu",), _sequence_obstacle),
  "xla": Kernel(plain, ("tpu", "cuda", "gpu", "rocm", "cpu")),
}


def causal(
  query_BPHC: jax.Array, key_BPGC: jax.Array, value_BPGC: jax.Array, kind: str
) -> jax.Array:
  """Returns softmax(query · key / √C) · value over positions up to the query's, [B, P, H, C].

  H / G query heads share each of the G keys and values.

  Args:
    kind: a row of KERNELS, as `choose` returns it.
  """
  arrays = (mesh_lib.constrain(x, *_BY_POSITION) for x in (query_BPHC, key_BPGC, value_BPGC))
  return KERNELS[kind].run(*arrays)


def choose(kind: str, positions: int, dtype: DTypeLike, platform: str = "") -> str:
  """Returns the row of KERNELS that computes attention: `kind`, or for `auto` the first that can.

  Args:
    kind: a row of KERNELS, or `auto`.
    positions: P, on all devices together.
    dtype: type of the products.
    platform: platform that the program is compiled for; see `mesh.platform` for the default.

  Raises:
    CalmError: for an unknown kind, or one that can't be used here.
  """
  sizes, dtype = _mesh_sizes(), jnp.dtype(dtype)
  platform = platform or mesh_lib.platform()
  if kind == "auto":
    return next(
      name
      for name, kernel in KERNELS.items()
      if platform in kernel.platforms and not kernel.obstacle(positions, sizes, dtype)
    )
  if kind not in KERNELS:
    nearest = config.nearest(kind, ["auto", *KERNELS])
    raise errors.CalmError(f"execution.attention is {kind!r}: {nearest}")
  kernel = KERNELS[kind]
  reason = kernel.obstacle(positions, sizes, dtype)
  if platform not in kernel.platforms:
    reason = f"it runs on {' and '.join(kernel.platforms)}, and this is {platform}"
  if reason:
    raise errors.CalmError(
      f"execution.attention={kind} can't be used: {reason}; auto chooses a kernel that can"
    )
  return kind


# Number of P x P products in each attention kernel of a compiled program, by prefix of its name:
# forward, the scores and the output; backward, the scores again and four gradients.
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = _PRODUCTS.values()


def products(kernel: str) -> int:
  """Returns the number of products of an attention kernel of a compiled program, 0 for others."""
  return next((count for name, count in _PRODUCTS.items() if kernel.startswith(name)), 0)


def product_flops(examples: int, positions: int, width: int) -> float:
  """Returns the FLOPs of the causal half of one product of one layer; see `padding`."""
  return examples * positions * positions * width


def padding(positions: int, channels: int, sizes: Sizes) -> float:
  """Returns the FLOPs of the TPU kernel, divided by `product_flops`.

  The kernel computes complete blocks where the diagonal cuts them, and pads a head's channels to a
  multiple of LANES.
  """
  lanes = -(-channels // LANES) * LANES
  return (1 + _block(positions, sizes) / positions) * lanes / channels
