"""Claims about fingerprints: they depend on every bit and its position, and on no sharding."""

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from calm_jax.training import fingerprint


def tree():
  generator = np.random.default_rng(0)
  return {
    "w": generator.normal(size=(8, 4, 6)).astype(np.float32),
    "half": jnp.asarray(generator.normal(size=(16,)), jnp.bfloat16),
    "byte": np.arange(-4, 4, dtype=np.int8),
    "step": np.int32(7),
  }


def test_fingerprints_depend_on_bits_names_and_shapes():
  a, b = jnp.arange(4.0), jnp.ones((4,))
  assert fingerprint.of((a, b)) == fingerprint.of((a + 0, b + 0))
  assert fingerprint.of((a, b)) != fingerprint.of((b, a))
  assert fingerprint.of((a, b)) != fingerprint.of((jnp.nextafter(a, 9.0), b))
  assert fingerprint.of({"a": a}) != fingerprint.of({"b": a})
  assert fingerprint.of(a) != fingerprint.of(a.reshape(2, 2))
  assert len(fingerprint.of(a)) == 16


def test_fingerprints_depend_on_the_position_of_every_element():
  """A plain sum of bits is the same for all of these changes."""
  w = tree()["w"]
  fingerprints = {fingerprint.of(w)}
  for i, j in ((0, 1), (0, 64), (3, 131), (190, 191)):
    swapped = w.reshape(-1).copy()
    swapped[[i, j]] = swapped[[j, i]]
    fingerprints.add(fingerprint.of(swapped.reshape(w.shape)))
  fingerprints.add(fingerprint.of(w[::-1]))
  opposite = np.float32([1, -1])
  fingerprints |= {fingerprint.of(opposite), fingerprint.of(opposite[::-1])}
  # One value larger and one smaller, by the same number.
  bits = w.view(np.uint32).copy()
  bits[0, 0, 0], bits[7, 3, 5] = bits[0, 0, 0] + 1, bits[7, 3, 5] - 1
  fingerprints.add(fingerprint.of(bits.view(np.float32)))
  assert len(fingerprints) == 9


def test_fingerprints_are_equal_for_every_sharding_and_on_the_host():
  values = tree()
  expected = fingerprint.of(values)
  assert fingerprint.digest(fingerprint.host_lines(jax.tree.map(np.asarray, values))) == expected
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  for spec in (("a", "b"), ("b", None, None), (("a", "b"),), ()):
    place = NamedSharding(mesh, PartitionSpec(*spec))
    assert fingerprint.of({**values, "w": jax.device_put(values["w"], place)}) == expected


def test_chunked_host_fingerprints_equal_those_of_one_pass(monkeypatch):
  values = tree()
  expected = fingerprint.host_lines(jax.tree.map(np.asarray, values))
  monkeypatch.setattr(fingerprint, "_CHUNK", 7)
  assert fingerprint.host_lines(jax.tree.map(np.asarray, values)) == expected
