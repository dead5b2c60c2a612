"""Claims about attention: each kernel equals the plain one; the TPU's compiles for every head."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding

from calm_jax import config, errors
from calm_jax.kernels import attention
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.planning.compiled import matmuls, program, topologies

BATCH, POSITIONS, HEADS, CHANNELS = 2, 256, 4, 64


def arrays(kv_heads: int, seed: int = 0) -> tuple[jax.Array, ...]:
  keys = jax.random.split(jax.random.key(seed), 4)
  shapes = [(BATCH, POSITIONS, heads, CHANNELS) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
  return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def values_and_gradients(run, query, key, value, weight):
  def total(query, key, value):
    y_BPHC = run(query, key, value)
    return jnp.sum(y_BPHC * weight), y_BPHC

  (_, y_BPHC), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(query, key, value)
  return y_BPHC, *grads


def by_numpy(query, key, value):
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  key, value = (np.repeat(x, HEADS // x.shape[2], axis=2) for x in (key, value))
  scores = np.einsum("bphc,bqhc->bhpq", query, key) / np.sqrt(CHANNELS)
  scores = np.where(np.tri(query.shape[1], dtype=bool), scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum("bhpq,bqhc->bphc", weights, value)


def assert_plain(outputs, inputs):
  """Asserts that values and gradients are those of the plain form, and values those of NumPy."""
  expected = jax.jit(functools.partial(values_and_gradients, attention.plain))(*inputs)
  np.testing.assert_allclose(outputs[0], by_numpy(*inputs[:3]), atol=1e-5)
  for output, plain in zip(outputs, expected, strict=True):
    np.testing.assert_allclose(output, plain, atol=2e-5)


interpreted = functools.partial(attention._splash, interpret=True)


@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
def test_the_tpu_kernel_has_the_values_and_gradients_of_plain_attention(kv_heads: int):
  inputs = arrays(kv_heads)
  outputs = jax.jit(functools.partial(values_and_gradients, interpreted))(*inputs)
  assert_plain(outputs, inputs)


@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("positions", [POSITIONS, 250, 40])
def test_blocks_of_queries_have_the_values_and_gradients_of_plain_attention(
  kv_heads: int, positions: int
):
  inputs = tuple(x[:, :positions] for x in arrays(kv_heads))
  blocks = attention.KERNELS["blocks"].run
  outputs = jax.jit(functools.partial(values_and_gradients, blocks))(*inputs)
  assert_plain(outputs, inputs)


def test_a_cpu_uses_blocks_unless_positions_are_divided():
  assert attention.choose("auto", POSITIONS, jnp.float32) == "blocks"
  with jax.set_mesh(mesh_lib.build(config.Mesh(fsdp=2, sequence=2, tensor=2), jax.devices())):
    assert attention.choose("auto", POSITIONS, jnp.float32) == "xla"


def test_a_gpu_uses_cudnn_where_it_computes_in_half_precision():
  """cuDNN refuses float32 while the step is traced."""
  for dtype, kernel in ((jnp.bfloat16, "cudnn"), (jnp.float16, "cudnn"), (jnp.float32, "xla")):
    assert attention.choose("auto", POSITIONS, dtype, "gpu") == kernel
  with pytest.raises(errors.CalmError, match="bfloat16 or float16, not float32; auto chooses"):
    attention.choose("cudnn", POSITIONS, jnp.float32, "gpu")


@pytest.mark.parametrize("sequence, tensor", [(2, 1), (1, 2), (2, 2)])
def test_dividing_positions_and_heads_changes_no_value(sequence: int, tensor: int):
  inputs = arrays(kv_heads=2)
  expected = jax.jit(functools.partial(values_and_gradients, interpreted))(*inputs)
  mesh = mesh_lib.build(config.Mesh(fsdp=2, sequence=sequence, tensor=tensor), jax.devices())
  place = NamedSharding(mesh, mesh_lib.spec("batch", "position", "width", None))
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, place) for x in inputs]
    outputs = jax.jit(functools.partial(values_and_gradients, interpreted))(*placed)
  for output, undivided in zip(outputs, expected, strict=True):
    np.testing.assert_allclose(output, undivided, atol=2e-5)


@pytest.fixture
def libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
  pytest.importorskip("libtpu", reason="compiling for a TPU needs its compiler")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def compiled(topology: str, channels: int, settings: config.Mesh, kv_heads: int = HEADS):
  mesh = mesh_lib.build(settings, topologies.devices(topologies.parse(topology)))
  place = NamedSharding(mesh, mesh_lib.spec("batch", "position", "width", None))
  shapes = [
    jax.ShapeDtypeStruct((4, 512, heads, channels), jnp.bfloat16, sharding=place)
    for heads in (HEADS, kv_heads, kv_heads, HEADS)
  ]
  with jax.set_mesh(mesh):
    kind = attention.choose("auto", 512, jnp.bfloat16)
    run = functools.partial(attention.causal, kind=kind)
    lowered = jax.jit(functools.partial(values_and_gradients, run)).lower(*shapes)
  return kind, program.compile_lowered(lowered)


@pytest.mark.parametrize("channels", [64, 96, 128, 160])
def test_the_tpu_kernel_compiles_for_every_published_head(channels: int, libtpu):
  for topology in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    kind, made = compiled(topology, channels, config.Mesh())
    assert kind == "splash" and made.overflow is None
    kernels = matmuls.kernels(made.module)
    assert sum(map(attention.products, kernels)) == 7, kernels  # Forward and backward.


@pytest.mark.parametrize(
  "settings, kv_heads",
  [(config.Mesh(sequence=2), HEADS), (config.Mesh(tensor=2), HEADS), (config.Mesh(sequence=4), 1)],
)
def test_the_tpu_kernel_compiles_on_divided_positions_and_heads(
  settings: config.Mesh, kv_heads: int, libtpu
):
  kind, made = compiled("v5e:2x2", 96, settings, kv_heads)
  assert kind == "splash" and len(matmuls.kernels(made.module)) == 2


def test_the_tpu_kernel_pads_blocks_on_the_diagonal_and_lanes():
  """512 of 2,048 positions at once: 10 blocks of 16 where 8 are causal; 96 channels in 128."""
  assert attention.padding(2048, 128, {"sequence": 1}) == pytest.approx(10 / 8)
  assert attention.padding(2048, 96, {"sequence": 1}) == pytest.approx(10 / 8 * 4 / 3)
  assert attention.padding(2048, 128, {"sequence": 16}) == pytest.approx(17 / 16)


def test_blocks_compute_no_product_twice_for_the_gradient():
  """Two products forward, four gradients of them backward."""
  query_BPHC = jnp.ones((1, attention.QUERIES, 2, 8))

  def loss(*arrays):
    return jnp.sum(attention.causal(*arrays, kind="blocks") ** 2)

  traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*[query_BPHC] * 3)
  assert str(traced).count("dot_general[") == 6
