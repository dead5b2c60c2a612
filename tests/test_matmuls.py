"""Claims about the FLOPs of a compiled program."""

import jax
import pytest
from jax import numpy as jnp

from calm_jax.planning.compiled import matmuls, runs

LAYERS, BATCH, WIDTH, FFN = 6, 64, 32, 128


def program(line: str, shapes: dict[str, str]) -> runs.Module:
  """A program of one line over parameters of these shapes."""
  parameters = [
    f"  %{name} = {shape} parameter({index})" for index, (name, shape) in enumerate(shapes.items())
  ]
  lines = ["HloModule one", "", "ENTRY %main () -> f32[] {", *parameters, f"  ROOT {line}", "}"]
  return runs.read("\n".join(lines))


def loss(ws, x, scanned: bool, checkpoint: bool):
  """Two products a layer; everything has a gradient."""

  def layer(x, w):
    return x + jnp.tanh(x @ w[0]) @ w[1], None

  layer = jax.checkpoint(layer) if checkpoint else layer
  if scanned:
    x, _ = jax.lax.scan(layer, x, ws)
  else:
    for index in range(LAYERS):
      x, _ = layer(x, jax.tree.map(lambda w, index=index: w[index], ws))
  return jnp.mean(x**2)


def count(scanned: bool, checkpoint: bool = False) -> float:
  ws = (jnp.ones((LAYERS, WIDTH, FFN)), jnp.ones((LAYERS, FFN, WIDTH)))
  x = jnp.ones((BATCH, WIDTH))
  step = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=(2, 3))
  return matmuls.flops(runs.read(step.lower(ws, x, scanned, checkpoint).compile().as_text()))


def test_a_scanned_model_has_the_flops_of_an_unrolled_one():
  product = 2 * BATCH * WIDTH * FFN
  # Two products forward, and two each for the gradients of inputs and of weights.
  assert count(scanned=False) == LAYERS * 6 * product
  assert count(scanned=True) == LAYERS * 6 * product


def test_recomputation_counts():
  # A layer's first product is recomputed; nothing needs the second one's value.
  assert count(scanned=True, checkpoint=True) == LAYERS * 7 * 2 * BATCH * WIDTH * FFN


def test_a_dot_with_a_batch_counts_every_product():
  x_BPD, y_BDF = jnp.ones((3, 5, 7)), jnp.ones((3, 7, 11))
  compiled = jax.jit(lambda x, y: jnp.einsum("bpd,bdf->bpf", x, y)).lower(x_BPD, y_BDF).compile()
  assert matmuls.flops(runs.read(compiled.as_text())) == 2 * 3 * 5 * 7 * 11


@pytest.mark.parametrize(
  "shapes, line, by_hand",
  [
    # [256, 512] @ [512, 2048] as the TPU compiler writes it.
    (
      {"a": "bf16[256,512]{1,0}", "b": "bf16[512,2048]{1,0}"},
      "%c = bf16[256,2048]{1,0} convolution(%a, %b), dim_labels=bf_io->bf",
      2 * 256 * 512 * 2048,
    ),
    # Contraction over a spatial dimension of which the output has one position.
    (
      {"a": "bf16[4,256,64]{2,1,0}", "b": "bf16[4,256,32]{2,1,0}"},
      "%c = bf16[64,32,1]{1,0,2} convolution(%a, %b), window={size=4}, dim_labels=0fb_0io->bf0",
      2 * 4 * 256 * 64 * 32,
    ),
    # 2 examples of 8 heads as dilated dimensions: an output position meets its own kernel only.
    (
      {"a": "bf16[2,64,8,128]{3,2,1,0}", "b": "bf16[2,32,8,128]{3,2,1,0}"},
      "%c = bf16[2,8,64,32]{3,2,1,0} convolution(%a, %b), window={size=2x8 stride=1x7 "
      "lhs_dilate=2x8}, dim_labels=0b1f_0o1i->01bf",
      2 * 2 * 8 * 64 * 32 * 128,
    ),
    # Query, key and value of 16 heads as output positions, over one input position.
    (
      {"a": "bf16[64,32,1,1]{1,0,3,2}", "b": "bf16[32,3,16,128]{3,2,1,0}"},
      "%c = bf16[64,3,16,128]{3,2,1,0} convolution(%a, %b), window={size=3x16 pad=2_2x15_15 "
      "rhs_reversal=1x1}, dim_labels=bf01_i01o->b01f",
      2 * 64 * 32 * 3 * 16 * 128,
    ),
    # An image and a 3x3 kernel, padded by one; fewer pairs meet at the border.
    (
      {"a": "f32[1,4,4,3]{3,2,1,0}", "b": "f32[3,3,3,16]{3,2,1,0}"},
      "%c = f32[1,4,4,16]{3,2,1,0} convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, "
      "dim_labels=b01f_01io->b01f",
      2 * 3 * 16 * (4 + 3 + 3) ** 2,
    ),
    # Depthwise: one kernel for each of 8 features.
    (
      {"a": "f32[1,6,8]{2,1,0}", "b": "f32[3,1,8]{2,1,0}"},
      "%c = f32[1,4,8]{2,1,0} convolution(%a, %b), window={size=3}, dim_labels=b0f_0io->b0f, "
      "feature_group_count=8",
      2 * 4 * 3 * 8,
    ),
  ],
)
def test_convolutions_count_the_pairs_that_meet(shapes: dict[str, str], line: str, by_hand: int):
  assert matmuls.flops(program(line, shapes)) == by_hand


def test_custom_calls_are_listed_by_name():
  line = '%splash.12 = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"'
  targets = {"tpu_custom_call": {"splash": 1}, "__cublas$gemm": {"__cublas$gemm": 1}}
  for target, counts in (*targets.items(), ("AllocateBuffer", {})):
    call = line.replace("tpu_custom_call", target)
    assert matmuls.kernels(program(call, {"a": "f32[8]{0}"})) == counts
