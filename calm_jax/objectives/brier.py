"""Samples -> numbers: BrierLM, a likelihood-free score of a language model.

All scores are in percent: higher is better, 100 is a deterministic model that
is always right; a calibrated model's expectation is positive.
"""

import jax
import numpy as np
from jax import numpy as jnp

ORDERS = 4  # BrierLM multiplies the scores of n-grams, n = 1 to 4.


def accuracy_and_collision(
  sample_NPK: jax.Array, target_PK: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Unbiased estimates of the two terms of Brier-n from all N samples, each [P, n].

  accuracy is E[1{x = y}] over samples x, collision E[1{x1 = x2}] over pairs of
  different samples, where x and y are a patch's first n tokens and n runs from 1
  to min(K, 4). Both are shares in [0, 1]. Brier-n = 2 · accuracy − collision; in a
  calibrated model the two are equal in expectation. Collision above accuracy is
  collapse, below it smearing.

  Raises:
    ValueError: if N < 2, where there is no pair.

  Source: CALM (arXiv:2510.27688), section 5, with a U-statistic over all N
  samples where the paper has two.
  """
  count = sample_NPK.shape[0]
  if count < 2:
    raise ValueError(f"BrierLM needs N >= 2 samples, got {count}")
  sample_NPn, target_Pn = sample_NPK[..., :ORDERS], target_PK[..., :ORDERS]
  hit_NPn = jnp.cumprod((sample_NPn == target_Pn[None]).astype(jnp.float32), axis=-1)
  same_NNPn = jnp.cumprod((sample_NPn[:, None] == sample_NPn[None]).astype(jnp.float32), axis=-1)
  pairs_Pn = jnp.sum(same_NNPn, axis=(0, 1)) - count  # Without each sample's pair with itself.
  return jnp.mean(hit_NPn, axis=0), pairs_Pn / (count * (count - 1))


def brier_lm(accuracy_n: np.ndarray, collision_n: np.ndarray) -> np.ndarray:
  """BrierLM in percent from accuracies and collisions [..., 4]: [...]. Higher is better.

  The geometric mean of Brier-1 to Brier-4, 0 where any of them is not positive.

  Source: CALM (arXiv:2510.27688), eq. 13.
  """
  brier_n = 2 * accuracy_n - collision_n
  positive = np.all(brier_n > 0, axis=-1)
  return np.where(positive, 100 * np.prod(np.maximum(brier_n, 0), axis=-1) ** (1 / ORDERS), 0.0)


def jackknife(values: np.ndarray, statistic) -> float:
  """Standard error of statistic(mean over blocks), leaving out one block at a time.

  Blocks, not positions, are the independent units: scores within one stretch of
  text are correlated.

  Args:
    values: [blocks, ...].
    statistic: maps means [..., *] with a leading axis of leave-one-outs to one
      number each.
  """
  blocks = len(values)
  if blocks < 2:
    return float("nan")
  left_out = (values.sum(axis=0) - values) / (blocks - 1)
  results = np.asarray(statistic(left_out), np.float64)
  return float(np.sqrt((blocks - 1) * np.mean((results - results.mean()) ** 2)))


def summary(accuracy: np.ndarray, collision: np.ndarray) -> dict[str, float]:
  """Scores with standard errors from per-block means.

  Args:
    accuracy, collision: [blocks, n], shares.

  Returns:
    accuracy_n, collision_n and brier_n in percent for each n, and, where n
    reaches 4, brier_lm with brier_lm_stderr.
  """
  both = np.stack([accuracy, collision], axis=1).astype(np.float64)
  result = {}
  for n in range(accuracy.shape[1]):
    mean_accuracy, mean_collision = both[:, 0, n].mean(), both[:, 1, n].mean()
    result[f"accuracy_{n + 1}"] = 100 * mean_accuracy
    result[f"collision_{n + 1}"] = 100 * mean_collision
    result[f"brier_{n + 1}"] = 100 * (2 * mean_accuracy - mean_collision)
    result[f"brier_{n + 1}_stderr"] = 100 * jackknife(
      both[:, :, n], lambda mean: 2 * mean[:, 0] - mean[:, 1]
    )
  if accuracy.shape[1] == ORDERS:
    mean = both.mean(axis=0)
    result["brier_lm"] = float(brier_lm(mean[0], mean[1]))
    result["brier_lm_stderr"] = jackknife(both, lambda mean: brier_lm(mean[:, 0], mean[:, 1]))
  return {name: float(value) for name, value in result.items()}


def marginal(train_PK: np.ndarray, heldout_PK: np.ndarray) -> dict[str, float]:
  """Scores of the unconditional law of training patches: what ignoring the context reaches.

  The law of the first n tokens is their frequency among the training patches;
  its accuracy on the held-out patches and its collision are exact sums.

  Args:
    train_PK, heldout_PK: tokens of patches, K >= 4.
  """
  accuracy, collision = [], []
  for n in range(1, ORDERS + 1):
    grams, counts = np.unique(_keys(train_PK[:, :n]), return_counts=True)
    share = counts / counts.sum()
    heldout = _keys(heldout_PK[:, :n])
    found = np.minimum(np.searchsorted(grams, heldout), len(grams) - 1)
    accuracy.append(np.mean(np.where(grams[found] == heldout, share[found], 0.0)))
    collision.append(np.sum(share**2))
  return {"brier_lm_marginal": float(brier_lm(np.array(accuracy), np.array(collision)))}


def _keys(token_Pn: np.ndarray) -> np.ndarray:
  """Returns one sortable value for each row of tokens."""
  rows = np.ascontiguousarray(token_Pn.astype(">u4"))
  return rows.view(np.dtype((np.void, rows.shape[1] * 4)))[:, 0]
