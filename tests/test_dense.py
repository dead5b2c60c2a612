"""Claims about the product of Linear layers: its own gradient is that of the plain product."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import config
from calm_jax.kernels import dense
from calm_jax.parallel import mesh as mesh_lib


def value_and_gradients(product, x_I, kernel_IO, weight_O):
  """Returns the product, then the gradients of its weighted sum, a sine for unequal slopes."""

  def total(x_I, kernel_IO):
    y_O = product(x_I, kernel_IO)
    return jnp.sum(jnp.sin(y_O) * weight_O), y_O

  (_, y_O), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(x_I, kernel_IO)
  return y_O, *gradients


def dot_general(x_I, kernel_IO):
  return dense.dot_general(x_I, kernel_IO, (((x_I.ndim - 1,), (0,)), ((), ())))


@pytest.mark.parametrize("shape", [(), (8,), (8, 4), (8, 4, 3)], ids=len)
@pytest.mark.parametrize(
  "sizes", [None, config.Mesh(fsdp=4, tensor=2), config.Mesh(fsdp=2, sequence=4)]
)
def test_value_and_gradients_are_those_of_the_plain_product(shape: tuple[int, ...], sizes):
  keys = jax.random.split(jax.random.key(0), 3)
  arrays = (
    jax.random.normal(keys[0], (*shape, 6)),
    jax.random.normal(keys[1], (6, 5)),
    jax.random.normal(keys[2], (*shape, 5)),
  )
  expected = value_and_gradients(dense.plain, *arrays)
  with jax.set_mesh(mesh_lib.single() if sizes is None else mesh_lib.build(sizes)):
    outputs = jax.jit(value_and_gradients, static_argnums=0)(dot_general, *arrays)
  for output, plain in zip(outputs, expected, strict=True):
    np.testing.assert_allclose(output, plain, rtol=1e-5, atol=1e-5)


def test_the_kernels_gradient_is_not_transposed():
  def gradient(product):
    traced = jax.make_jaxpr(value_and_gradients, static_argnums=0)(
      product, jnp.ones((8, 6)), jnp.ones((6, 5)), jnp.ones((8, 5))
    )
    return str(traced)

  assert "transpose[" in gradient(dense.plain)
  assert "transpose[" not in gradient(dot_general)
