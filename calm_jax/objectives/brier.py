"""Samples -> numbers: BrierLM, a likelihood-free score of a language model.

All scores are in percent: higher is better, 100 is a deterministic model that
is always right; a calibrated model's expectation is positive.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax import numpy as jnp

ORDERS = 4  # BrierLM multiplies the scores of n-grams, n = 1 to 4.


def accuracy(sample_NPK: jax.Array, target_PK: jax.Array) -> jax.Array:
  """Share of N samples whose first n tokens are the target's, n = 1 to K: [P, K] in [0, 1]."""
  return jnp.mean(_equal_so_far(sample_NPK, target_PK[None]), axis=0)


def collision(sample_NPK: jax.Array) -> jax.Array:
  """Share of pairs of different samples whose first n tokens are equal: [P, K] in [0, 1].

  Raises:
    ValueError: if N < 2, where there is no pair.
  """
  count = sample_NPK.shape[0]
  if count < 2:
    raise ValueError(f"BrierLM needs N >= 2 samples, got {count}")
  same_NNPK = _equal_so_far(sample_NPK[:, None], sample_NPK[None])
  pairs_PK = jnp.sum(same_NNPK, axis=(0, 1)) - count  # Without each sample's pair with itself.
  return pairs_PK / (count * (count - 1))


def repeats(sample_NPK: jax.Array) -> jax.Array:
  """Share of samples 2 to N that are the first one: [P] in [0, 1]."""
  return jnp.mean(_equal_so_far(sample_NPK[1:], sample_NPK[:1])[..., -1], axis=0)


def _equal_so_far(a_K: jax.Array, b_K: jax.Array) -> jax.Array:
  return jnp.cumprod((a_K == b_K).astype(jnp.float32), axis=-1)


def chain(within: Sequence[jax.Array], whole: Sequence[jax.Array]) -> jax.Array:
  """The accuracy or collision of n-grams, n = 1 to 4, from those of the patches they span.

  Unbiased where the estimates of different patches are independent given the text
  and the path that is followed.

  Args:
    within: for each patch in turn, the share of its first 1 to K tokens, [..., K].
    whole: for each but the last, the factor by which the n-gram goes on past it, [...].

  Returns:
    [..., 4].

  Source: CALM (arXiv:2510.27688), section 5. With K < 4 the paper goes on along one
  sample's path for accuracy and collision. Collision is the same here, with N
  samples a patch; accuracy is the product of the teacher-forced ones, which has the
  same expectation and no need of a path. Where the backbone reads latents this holds
  nearly: the teacher-forced ones read a posterior draw of the text, the paper's path
  the sample's own latent.
  """
  parts, factor = [], jnp.ones_like(within[0][..., 0])
  for share_K, goes_on in zip(within, [*whole, None], strict=True):
    parts.append(factor[..., None] * share_K)
    if goes_on is not None:
      factor = factor * goes_on
  return jnp.concatenate(parts, axis=-1)[..., :ORDERS]


def patches_spanned(patch_size: int) -> int:
  """Returns the number of patches that 4 tokens from a patch's start reach into."""
  return -(-ORDERS // patch_size)


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


def summary(accuracy_n: np.ndarray, collision_n: np.ndarray) -> dict[str, float]:
  """Scores with standard errors from per-block means.

  Args:
    accuracy_n, collision_n: [blocks, 4], shares.

  Returns:
    accuracy_n, collision_n and brier_n in percent for each n, and brier_lm, with
    standard errors.
  """
  both = np.stack([accuracy_n, collision_n], axis=1).astype(np.float64)
  result = {}
  for n in range(ORDERS):
    mean_accuracy, mean_collision = both[:, 0, n].mean(), both[:, 1, n].mean()
    result[f"accuracy_{n + 1}"] = 100 * mean_accuracy
    result[f"collision_{n + 1}"] = 100 * mean_collision
    result[f"brier_{n + 1}"] = 100 * (2 * mean_accuracy - mean_collision)
    result[f"brier_{n + 1}_stderr"] = 100 * jackknife(
      both[:, :, n], lambda mean: 2 * mean[:, 0] - mean[:, 1]
    )
  mean = both.mean(axis=0)
  result["brier_lm"] = float(brier_lm(mean[0], mean[1]))
  result["brier_lm_stderr"] = jackknife(both, lambda mean: brier_lm(mean[:, 0], mean[:, 1]))
  return {name: float(value) for name, value in result.items()}


def marginal(train_Pn: np.ndarray, heldout_Pn: np.ndarray) -> dict[str, float]:
  """Scores of the unconditional law of 4-grams in training: what ignoring the context reaches.

  The law of the first n tokens is their frequency in training; its accuracy on
  the held-out text and its collision are exact sums.

  Args:
    train_Pn, heldout_Pn: the 4 tokens from the starts of patches on, [P, 4].
  """
  accuracy_n, collision_n = [], []
  for n in range(1, ORDERS + 1):
    grams, counts = np.unique(_keys(train_Pn[:, :n]), return_counts=True)
    share = counts / counts.sum()
    heldout = _keys(heldout_Pn[:, :n])
    found = np.minimum(np.searchsorted(grams, heldout), len(grams) - 1)
    accuracy_n.append(np.mean(np.where(grams[found] == heldout, share[found], 0.0)))
    collision_n.append(np.sum(share**2))
  return {"brier_lm_marginal": float(brier_lm(np.array(accuracy_n), np.array(collision_n)))}


def grams(token_S: np.ndarray, patch_size: int) -> np.ndarray:
  """Returns the 4 tokens from each patch's start on, where there are so many: [..., P, 4]."""
  rows = np.lib.stride_tricks.sliding_window_view(token_S, ORDERS, axis=-1)
  return rows[..., ::patch_size, :]


def _keys(token_Pn: np.ndarray) -> np.ndarray:
  """Returns one sortable value for each row of tokens."""
  rows = np.ascontiguousarray(token_Pn.astype(">u4"))
  return rows.view(np.dtype((np.void, rows.shape[1] * 4)))[:, 0]
