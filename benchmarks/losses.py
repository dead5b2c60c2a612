"""Time, memory and error of the losses: with materialised arrays, and as we compute them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from benchmarks import timing
from calm_jax.kernels import cross_entropy
from calm_jax.objectives import energy_score

REPETITIONS = 9
EXAMPLES, PATCHES, LATENT = 8, 128, 64
SAMPLES, DRAWS = 8, 100
MANY_DRAWS = 100_000  # For FEW_PATCHES of each example: errors are relative to this loss.
FEW_PATCHES = 4
POSITIONS, WIDTH, VOCAB = 4096, 256, 8192

# (samples, mean, std, key) -> energy loss per patch, [P].
Energy = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def _drawn(count: int) -> Energy:
  def energy(sample_NPZ, mean_PZ, std_PZ, key):
    attraction_P = energy_score.drawn_attraction(key, sample_NPZ, mean_PZ, std_PZ, count)
    return energy_score.energy_loss(sample_NPZ, attraction_P)[0]

  return energy


def _exact(sample_NPZ, mean_PZ, std_PZ, key):
  attraction_P = energy_score.expected_attraction(sample_NPZ, mean_PZ, std_PZ)
  return energy_score.energy_loss(sample_NPZ, attraction_P)[0]


def _materialised(sample_NPZ, mean_PZ, std_PZ, key):
  """Energy loss over an array of all pairs of samples and draws."""
  eps_MPZ = jax.random.normal(key, (DRAWS, *mean_PZ.shape))
  target_MPZ = mean_PZ[None] + std_PZ[None] * eps_MPZ
  distance_NMP = energy_score.norm_power(sample_NPZ[:, None] - target_MPZ[None], 1.0)
  return energy_score.energy_loss(sample_NPZ, jnp.mean(distance_NMP, axis=(0, 1)))[0]


ENERGIES: dict[str, Energy] = {
  "whole array of pairs": _materialised,
  "ours, draws": _drawn(DRAWS),
  "ours, exact": _exact,
}


def _value_and_gradient(energy: Energy) -> jax.stages.Wrapped:
  """Returns the mean over examples and its gradient, as training computes them."""
  return jax.jit(jax.value_and_grad(lambda *inputs: jnp.mean(jax.vmap(energy)(*inputs))))


def _posteriors(patches: int) -> tuple[jax.Array, ...]:
  """Returns samples, means, stds and keys, [B, ...], as far apart as a trained model's.

  The std is near 0.3.
  """
  keys = jax.random.split(jax.random.key(0), 4)
  mean_BPZ = jax.random.normal(keys[0], (EXAMPLES, patches, LATENT))
  std_BPZ = 0.3 * jnp.exp(0.3 * jax.random.normal(keys[1], mean_BPZ.shape))
  shape = (EXAMPLES, SAMPLES, patches, LATENT)
  sample_BNPZ = mean_BPZ[:, None] + 0.6 * jax.random.normal(keys[2], shape)
  return sample_BNPZ, mean_BPZ, std_BPZ, jax.random.split(keys[3], EXAMPLES)


def _cost(function: jax.stages.Wrapped, *inputs: jax.Array) -> dict[str, Any]:
  """Returns seconds, and bytes of temporaries where the platform reports them."""
  analysis = function.lower(*inputs).compile().memory_analysis()
  return {
    "seconds": timing.median_seconds(lambda: function(*inputs), REPETITIONS),
    "temporary_bytes": analysis.temp_size_in_bytes if analysis else None,
  }


def _energies() -> list[dict[str, Any]]:
  inputs, few_inputs = _posteriors(PATCHES), _posteriors(FEW_PATCHES)
  value, gradient = _value_and_gradient(_drawn(MANY_DRAWS))(*few_inputs)
  figures = []
  for name, energy in ENERGIES.items():
    both = _value_and_gradient(energy)
    own, own_gradient = both(*few_inputs)
    error = float(jnp.linalg.norm(own_gradient - gradient) / jnp.linalg.norm(gradient))
    figures.append(
      {
        "name": name,
        **_cost(both, *inputs),
        "error": abs(float(own - value)) / abs(float(value)),
        "gradient_error": error,
      }
    )
  return figures


def _materialised_logits(table_VE, feature_BPE, token_BP, weight_BP):
  log_p_BPV = jax.nn.log_softmax(feature_BPE @ table_VE.T)
  picked_BP = jnp.take_along_axis(log_p_BPV, token_BP[..., None], axis=-1)[..., 0]
  return -jnp.sum(weight_BP * picked_BP)


def _ours(*inputs):
  return cross_entropy.scores(*inputs).loss


def _cross_entropies() -> list[dict[str, Any]]:
  keys = jax.random.split(jax.random.key(0), 3)
  table_VE = 0.05 * jax.random.normal(keys[0], (VOCAB, WIDTH))
  feature_BPE = jax.random.normal(keys[1], (8, POSITIONS // 8, WIDTH))
  token_BP = jax.random.randint(keys[2], feature_BPE.shape[:2], 0, VOCAB)
  weight_BP = jnp.full(token_BP.shape, 1 / POSITIONS)
  inputs, figures, expected = (table_VE, feature_BPE, token_BP, weight_BP), [], None
  for name, loss in (("whole logits", _materialised_logits), ("ours", _ours)):
    both = jax.jit(jax.value_and_grad(loss, (0, 1)))
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(both(*inputs)[1])])
    expected = flat if expected is None else expected
    error = float(np.linalg.norm(flat - expected) / np.linalg.norm(expected))
    figures.append({"name": name, **_cost(both, *inputs), "gradient_error": error})
  return figures


def _line(row: dict[str, Any]) -> str:
  size = row["temporary_bytes"]
  temporaries = "" if size is None else f", {size / 1e6:7,.1f} MB of temporaries"
  return f"  {row['name']:20} {1e3 * row['seconds']:7.1f} ms{temporaries}"


def measure() -> tuple[list[str], dict[str, Any]]:
  """Returns lines to print, and the figures: seconds, bytes and errors, lower is better."""
  energies, cross_entropies = _energies(), _cross_entropies()
  lines = [
    f"energy loss and its gradient, {EXAMPLES} examples of {PATCHES} patches, Z = {LATENT}, "
    f"N = {SAMPLES}, M = {DRAWS}; errors of the mean and of its gradient, {FEW_PATCHES} patches of "
    f"each, against M = {MANY_DRAWS:,}, whose own errors are about "
    f"{(DRAWS / MANY_DRAWS) ** 0.5:.3f} of those of M = {DRAWS}"
  ]
  lines += [
    f"{_line(row)}, error {row['error']:.1e}, of the gradient {row['gradient_error']:.1e}"
    for row in energies
  ]
  lines.append(
    f"cross-entropy and its gradients, {POSITIONS:,} positions of width {WIDTH}, V = {VOCAB:,}"
  )
  lines += [
    f"{_line(row)}, gradients differ from whole logits' by {row['gradient_error']:.1e}"
    for row in cross_entropies
  ]
  return lines, {"energy": energies, "cross_entropy": cross_entropies}
