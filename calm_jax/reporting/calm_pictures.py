"""An account of stage two -> pictures: BrierLM, use of the context, energy."""

from matplotlib.figure import Figure

from calm_jax.reporting import brier_pictures, drawing, records


def _conditioning_gap(figure: Figure, account: records.Account) -> None:
  axes = figure.subplots()
  drawing.evaluated(
    axes,
    records.column(account.evaluations, "step"),
    account.evaluations,
    "conditioning_gap",
    "conditioning gap ± 1 standard error",
    drawing.BLUE,
  )
  axes.axhline(0, color=drawing.GREY, linestyle="--", label="a model that ignores its context")
  axes.set_ylabel("gap (latent unit^alpha)")
  axes.legend()
  drawing.step_axis(axes)


def _energy(figure: Figure, account: records.Account) -> None:
  axes = figure.subplots()
  drawing.trace(axes, account, "attraction", "attraction, sample to target", drawing.BLUE)
  drawing.trace(axes, account, "repulsion", "repulsion, sample to sample", drawing.VERMILLION)
  axes.set_ylabel("distance (latent unit^alpha)")
  axes.legend()
  drawing.step_axis(axes)


PICTURES = (
  *brier_pictures.PICTURES,
  drawing.Picture(
    "Conditioning gap",
    "evaluations",
    "conditioning_gap",
    "Rise of the energy score if each sample is compared with the next position's target instead "
    "of its own. Higher is better.",
    _conditioning_gap,
  ),
  drawing.Picture(
    "Attraction and repulsion",
    "train",
    "attraction",
    "Mean distances, with equal expectations for a calibrated model. The loss is twice the "
    "attraction minus the repulsion.",
    _energy,
  ),
)
