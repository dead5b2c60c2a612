"""An account of a language model -> a picture of accuracy against collision by temperature."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from calm_jax.reporting import drawing, records

_COLORS = (drawing.BLUE, drawing.VERMILLION, drawing.GREEN, drawing.PURPLE, drawing.ORANGE)

# Offsets of a curve's temperature labels from its dots, in points.
_PLACES = ((5, -11), (5, 5), (-18, 5), (-18, -11), (-6, 9))


def _curve(axes, rows: Sequence[records.Record], label: str, number: int, style: str) -> None:
  """Draws a curve over falling temperature; the dot at T = 1, shared by all, has no label."""
  rows = sorted(rows, key=lambda row: -row["temperature"])
  color = _COLORS[number % len(_COLORS)]
  collision, accuracy = ([row[name][0] for row in rows] for name in ("collision", "accuracy"))
  axes.plot(
    collision, accuracy, label=label, color=color, linestyle=style, marker="o", markersize=4
  )
  for x, y, row in zip(collision, accuracy, rows, strict=True):
    if row["temperature"] != 1:
      axes.annotate(
        f"{row['temperature']:.2g}",
        (x, y),
        textcoords="offset points",
        xytext=_PLACES[number % len(_PLACES)],
        fontsize=7,
        color=color,
      )


def _tradeoff(figure: Figure, account: records.Account) -> None:
  assert account.tradeoff is not None
  axes, rows = figure.subplots(), account.tradeoff["rows"]
  start = [row for row in rows if row["temperature"] == 1][:1]
  samplers: dict[tuple[str, str, int], list[records.Record]] = {}
  for row in rows:
    if row["temperature"] != 1 or len(rows) == 1:
      samplers.setdefault((row["rule"], row["at_limit"], row["num_candidates"]), []).append(row)
  for number, ((rule, at_limit, n), curve) in enumerate(samplers.items()):
    draws = [row["draws"] for row in curve]
    spread = f"{min(draws):.0f} to {max(draws):.0f}" if max(draws) >= min(draws) + 1 else f"{n}"
    label = f"{rule}, one draw" if n == 1 else f"{rule}:{at_limit}, N = {n}: {spread} draws"
    _curve(axes, [*start, *curve], label, number, "-")
  baseline = account.tradeoff.get("baseline")
  if baseline:
    _curve(axes, baseline, "Transformer", len(samplers), "--")
  first = (start or rows)[0]
  axes.errorbar(
    first["collision"][0],
    first["accuracy"][0],
    first["accuracy_error"][0],
    color=drawing.BLACK,
    marker="o",
    markersize=5,
    elinewidth=1,
    label="T = 1 ± 1 standard error, shared by all",
  )
  axes.set_xlabel("collision of two first tokens (%)")
  axes.set_ylabel("accuracy of the first token (%)")
  figure.legend(loc="outside upper center", ncols=2)


PICTURES = (
  drawing.Picture(
    "Temperature",
    "tradeoff",
    "rows",
    "Accuracy gained and diversity lost as the temperature falls; the numbers at the dots are "
    "temperatures. Higher and further left is better.",
    _tradeoff,
    flags="--temperatures=1,0.7,0.5,0.333",
  ),
)
