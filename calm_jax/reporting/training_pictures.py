"""An account of any stage -> pictures of its training: loss, learning rate, norms, speed."""

from matplotlib.figure import Figure

from calm_jax.reporting import drawing, records


def _loss(figure: Figure, account: records.Account) -> None:
  axes = figure.subplots()
  drawing.trace(axes, account, "loss", "training loss", drawing.BLUE)
  drawing.log_y(axes, only_if_wide=True)
  axes.set_ylabel(f"loss ({account.presentation.loss_unit(account.run)})")
  axes.legend()
  drawing.step_axis(axes)


def _learning_rate(figure: Figure, account: records.Account) -> None:
  axes = figure.subplots()
  steps, rates = (records.column(account.train, name) for name in ("step", "learning_rate"))
  axes.plot(
    steps,
    rates,
    color=drawing.BLUE,
    marker=drawing.marker(account.train),
    markersize=2,
    label=f"{account.run.optimizer.schedule} schedule",
  )
  axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
  axes.set_ylim(bottom=0)
  axes.set_ylabel("learning rate")
  axes.legend()
  drawing.step_axis(axes)


def _norms(figure: Figure, account: records.Account) -> None:
  axes = figure.subplots()
  for name, color in (
    ("parameter", drawing.BLACK),
    ("gradient", drawing.BLUE),
    ("update", drawing.ORANGE),
  ):
    drawing.trace(axes, account, f"{name}_norm", name, color)
  clip = account.run.optimizer.clip_norm
  axes.axhline(clip, color=drawing.GREY, linestyle=":", label=f"gradients are clipped to {clip:g}")
  drawing.log_y(axes)
  axes.set_ylabel("L2 norm over all parameters")
  figure.legend(loc="outside upper center", ncols=2)
  drawing.step_axis(axes)


def _speed(figure: Figure, account: records.Account) -> None:
  upper, lower = drawing.panels(figure, 2, [2, 1])
  drawing.trace(upper, account, "tokens_per_second", "all devices", drawing.GREEN)
  median = records.tokens_per_second(account)
  upper.axhline(median, color=drawing.GREY, linestyle="--", label=f"median {median:,.0f}")
  upper.set_ylim(bottom=0)
  upper.set_ylabel("tokens/s")
  upper.legend(loc="lower right")
  drawing.trace(lower, account, "data_wait_share", "waiting for data", drawing.VERMILLION, 100)
  lower.set_ylim(bottom=0)
  lower.set_ylabel("data wait (%)")
  drawing.step_axis(lower)


PICTURES = (
  drawing.Picture(
    "Training loss",
    "train",
    "loss",
    "Lower is better. A loss that rises or jumps suggests a problem with the learning rate or the "
    "data.",
    _loss,
  ),
  drawing.Picture(
    "Learning rate",
    "train",
    "learning_rate",
    "The schedule as applied.",
    _learning_rate,
  ),
  drawing.Picture(
    "Gradient, update and parameter norms",
    "train",
    "gradient_norm",
    "The gradient is measured before clipping. A healthy update is a small, steady share of the "
    "parameters.",
    _norms,
  ),
  drawing.Picture(
    "Speed and waiting for data",
    "train",
    "tokens_per_second",
    "Higher is better; compiling, evaluating and saving are left out. A data wait far above 0 % "
    "means that reading limits the speed, not computing.",
    _speed,
  ),
)
