"""An account of stage one -> pictures: reconstruction over steps, posterior by dimension."""

import numpy as np
from matplotlib.figure import Figure

from calm_jax.reporting import drawing, records

_TRAIN = "training, tokens and latents dropped"
_HELDOUT = "held-out"


def _accuracy(figure: Figure, account: records.Account) -> None:
  upper, lower = drawing.panels(figure, 2)
  heldout = account.evaluations
  steps = records.column(heldout, "step")
  drawing.trace(upper, account, "token_accuracy", _TRAIN, drawing.SKY, 100)
  drawing.evaluated(
    upper, steps, heldout, "token_accuracy", f"{_HELDOUT}, ± 1 standard error", drawing.BLUE, 100
  )
  upper.set_ylabel("token accuracy (%)")
  upper.legend(loc="lower right")
  for reports, color in ((account.train, drawing.SKY), (heldout, drawing.BLUE)):
    error_percent = 100 * (1 - records.column(reports, "token_accuracy"))
    error_percent = np.where(error_percent > 0, error_percent, np.nan)
    lower.plot(
      records.column(reports, "step"),
      error_percent,
      color=color,
      marker=drawing.marker(reports),
      markersize=2.5,
    )
  drawing.log_y(lower)
  lower.set_ylabel("wrong tokens (%)")
  drawing.step_axis(lower)


def _cross_entropy(figure: Figure, account: records.Account) -> None:
  axes = figure.subplots()
  steps = records.column(account.evaluations, "step")
  drawing.trace(axes, account, "cross_entropy", _TRAIN, drawing.SKY)
  drawing.evaluated(
    axes,
    steps,
    account.evaluations,
    "cross_entropy",
    f"{_HELDOUT}, ± 1 standard error",
    drawing.BLUE,
  )
  drawing.log_y(axes, only_if_wide=True)
  axes.set_ylabel("cross-entropy (nats a token)")
  axes.legend()
  drawing.step_axis(axes)


def _posterior(figure: Figure, account: records.Account) -> None:
  figures = account.best_evaluation or {}
  kl = np.asarray(figures["kl_by_dimension"], np.float64)
  std = np.asarray(figures["posterior_std_by_dimension"], np.float64)
  order, rank = np.argsort(-kl), np.arange(1, len(kl) + 1)
  upper, lower = drawing.panels(figure, 2)
  upper.bar(rank, kl[order], width=0.85, color=drawing.BLUE)
  floor = account.run.loss.kl_floor
  active = int((kl > floor).sum())
  upper.axhline(
    floor,
    color=drawing.VERMILLION,
    linestyle="--",
    label=f"KL floor {floor:g}: {active} of {len(kl)} dimensions above",
  )
  upper.set_ylabel("KL (nats)")
  upper.legend(loc="upper right")
  lower.bar(rank, std[order], width=0.85, color=drawing.GREEN)
  lower.axhline(1, color=drawing.VERMILLION, linestyle="--", label="std of the prior")
  lower.set_ylim(0, max(1.25, 1.1 * std.max()))
  lower.set_ylabel("posterior std")
  lower.legend(loc="upper left")
  lower.set_xlabel("latent dimension, by falling KL")


PICTURES = (
  drawing.Picture(
    "Token accuracy",
    "train",
    "token_accuracy",
    "Above: higher is better. Below: the distance to 100 %, on a logarithmic axis; lower is "
    "better. Stage two decodes what the model samples, so an autoencoder has to be near-lossless.",
    _accuracy,
  ),
  drawing.Picture(
    "Cross-entropy",
    "train",
    "cross_entropy",
    "Lower is better.",
    _cross_entropy,
  ),
  drawing.Picture(
    "Posterior by latent dimension",
    "evaluation",
    "kl_by_dimension",
    "A dimension at the prior (std 1, KL 0) carries no information; the KL floor keeps "
    "dimensions from collapsing there. A std near 0 would give stage two a brittle latent space.",
    _posterior,
  ),
)
