"""Samples -> numbers: BrierLM, a likelihood-free score of a language model.

All scores are in percent, higher is better: 100 is a deterministic model that is always
right. The expected score of a calibrated model is positive.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

ORDERS = 4  # BrierLM multiplies the scores of n-grams for n = 1 to 4.


def accuracy(sample_NPK: jax.Array, target_PK: jax.Array) -> jax.Array:
  """Share of N samples whose first n tokens are the target's, n = 1 to K: [P, K] in [0, 1]."""
  return jnp.mean(_equal_so_far(sample_NPK, target_PK[None]), axis=0)


def collision(sample_NPK: jax.Array) -> jax.Array:
  """Share of pairs of two samples whose first n tokens are equal, n = 1 to K: [P, K] in [0, 1].

  Raises:
    ValueError: if N < 2, where no pair exists.
  """
  count = sample_NPK.shape[0]
  if count < 2:
    raise ValueError(f"BrierLM needs N >= 2 samples, got {count}")
  equal_NNPK = _equal_so_far(sample_NPK[:, None], sample_NPK[None])
  pairs_PK = jnp.sum(equal_NNPK, axis=(0, 1)) - count  # No sample is paired with itself.
  return pairs_PK / (count * (count - 1))


def expected(
  logit_NPKU: jax.Array, candidate_KU: jax.Array, target_PK: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Expected accuracy and collision of samples whose tokens are drawn: [P, K] each, in [0, 1].

  Those of `accuracy` and `collision`, if each sample were not its most likely tokens but a draw of
  every place's softmax. They have a gradient; 2 · accuracy − collision is a strictly proper score
  of the law of the drawn tokens.

  Args:
    logit_NPKU: N samples' logits of U candidates for each place, the only tokens with a share.
    candidate_KU: the candidates' tokens. One that occurs more than once counts once.
    target_PK: tokens that count as right; at a place where it is no candidate, none is.

  Raises:
    ValueError: if N < 2, where no pair exists.
  """
  count = logit_NPKU.shape[0]
  if count < 2:
    raise ValueError(f"the expected collision needs N >= 2 samples, got {count}")
  same_KUU = candidate_KU[:, :, None] == candidate_KU[:, None, :]
  times_11KU = jnp.sum(same_KUU, axis=-1)[None, None]
  # Each occurrence has an equal part of its token's share.
  part_NPKU = jax.nn.softmax(logit_NPKU - jnp.log(times_11KU), axis=-1)
  right_PKU = candidate_KU[None] == target_PK[..., None]
  accuracy_NPK = jnp.sum(jnp.where(right_PKU[None], part_NPKU, 0.0), axis=-1)
  equal_PKNN = jnp.einsum("nPKU,mPKU->PKnm", part_NPKU, part_NPKU * times_11KU)
  equal_PKNN = jnp.cumprod(equal_PKNN, axis=1)
  itself_PK = jnp.trace(equal_PKNN, axis1=-2, axis2=-1)
  pairs_PK = jnp.sum(equal_PKNN, axis=(-2, -1)) - itself_PK
  return jnp.mean(jnp.cumprod(accuracy_NPK, axis=-1), axis=0), pairs_PK / (count * (count - 1))


def repeats(sample_NPK: jax.Array) -> jax.Array:
  """Share of samples 2 to N that equal the first sample: [P] in [0, 1]."""
  return jnp.mean(_equal_so_far(sample_NPK[1:], sample_NPK[:1])[..., -1], axis=0)


def _equal_so_far(a_K: jax.Array, b_K: jax.Array) -> jax.Array:
  """Returns 1 where the first n tokens are equal, else 0, n = 1 to K: [..., K]."""
  return jnp.cumprod((a_K == b_K).astype(jnp.float32), axis=-1)


def chain(within: Sequence[jax.Array], whole: Sequence[jax.Array]) -> jax.Array:
  """Accuracy or collision of n-grams, n = 1 to 4, from the patches that they span: [..., 4].

  Unbiased if the estimates of different patches are independent given the text and the path
  that is followed.

  Args:
    within: per patch, the share for its first 1 to K tokens, [..., K].
    whole: per patch except the last, the share for the complete patch, [...]: the factor by
      which n-grams continue into the next patch.

  Source: CALM (arXiv:2510.27688), section 5. For K < 4 the paper follows one sample's path,
  for accuracy and for collision. Our collision does the same, with N samples per patch. Our
  accuracy is the product of teacher-forced accuracies, which has the same expectation and
  needs no path. If the backbone reads latents, this holds only nearly: teacher forcing reads
  a posterior draw of the text, the paper's path reads the sample's own latent.
  """
  parts, factor = [], jnp.ones_like(within[0][..., 0])
  for share_K, complete in zip(within, [*whole, None], strict=True):
    parts.append(factor[..., None] * share_K)
    if complete is not None:
      factor = factor * complete
  return jnp.concatenate(parts, axis=-1)[..., :ORDERS]


def patches_spanned(patch_size: int) -> int:
  """Returns the number of patches that 4 tokens span, counted from the start of a patch."""
  return -(-ORDERS // patch_size)


def brier_lm(accuracy_n: np.ndarray, collision_n: np.ndarray) -> np.ndarray:
  """BrierLM in percent, from accuracies and collisions [..., 4]: [...]. Higher is better.

  The geometric mean of Brier-1 to Brier-4, or 0 if any of them is not positive.

  Source: CALM (arXiv:2510.27688), eq. 13.
  """
  brier_n = 2 * accuracy_n - collision_n
  is_positive = np.all(brier_n > 0, axis=-1)
  return np.where(is_positive, 100 * np.prod(np.maximum(brier_n, 0), axis=-1) ** (1 / ORDERS), 0.0)


def jackknife(values: np.ndarray, statistic: Callable[[np.ndarray], Any]) -> float:
  """Jackknife standard error of statistic(mean over blocks), NaN for fewer than 2 blocks.

  Blocks, not positions, are the independent units: scores within one block of text are
  correlated.

  Args:
    values: [blocks, ...].
    statistic: maps means [blocks, ...], each without one of the blocks, to numbers [blocks].
  """
  blocks = len(values)
  if blocks < 2:
    return float("nan")
  left_out = (values.sum(axis=0) - values) / (blocks - 1)
  results = np.asarray(statistic(left_out), np.float64)
  return float(np.sqrt((blocks - 1) * np.mean((results - results.mean()) ** 2)))


def summary(accuracy_n: np.ndarray, collision_n: np.ndarray) -> dict[str, float]:
  """Returns scores in percent, with standard errors, from per-block means.

  The keys are accuracy_n, collision_n, brier_n and brier_n_stderr for n = 1 to 4, and
  brier_lm and brier_lm_stderr.

  Args:
    accuracy_n, collision_n: [blocks, 4], shares.
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
  """Returns BrierLM of a model that ignores the context, as {"brier_lm_marginal": percent}.

  The model's probability of the first n tokens is their frequency in training. Its accuracy
  on the held-out text and its collision are exact sums.

  Args:
    train_Pn, heldout_Pn: the first 4 tokens from the start of each patch, [P, 4].
  """
  accuracy_n, collision_n = [], []
  for n in range(1, ORDERS + 1):
    grams, counts = np.unique(_keys(train_Pn[:, :n]), return_counts=True)
    share = counts / counts.sum()
    heldout = _keys(heldout_Pn[:, :n])
    row = np.minimum(np.searchsorted(grams, heldout), len(grams) - 1)
    accuracy_n.append(np.mean(np.where(grams[row] == heldout, share[row], 0.0)))
    collision_n.append(np.sum(share**2))
  return {"brier_lm_marginal": float(brier_lm(np.array(accuracy_n), np.array(collision_n)))}


def grams(token_S: np.ndarray, patch_size: int) -> np.ndarray:
  """Returns the 4 tokens from the start of each patch that has 4 tokens after it: [..., P, 4]."""
  rows = np.lib.stride_tricks.sliding_window_view(token_S, ORDERS, axis=-1)
  return rows[..., ::patch_size, :]


def _keys(token_Pn: np.ndarray) -> np.ndarray:
  """Returns one sortable value per row of tokens: [P, n] -> [P]."""
  rows = np.ascontiguousarray(token_Pn.astype(">u4"))
  return rows.view(np.dtype((np.void, rows.shape[1] * 4)))[:, 0]
