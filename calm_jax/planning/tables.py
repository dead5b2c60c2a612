"""Plans -> printed tables."""

from collections.abc import Sequence

from calm_jax.planning import result
from calm_jax.planning.compiled import collectives, roofline


def table(plan: result.Plan) -> str:
  """Returns a plan's sections, notes and refusal."""
  sections = [
    (f"{plan.facts.name} on {_where(plan)}", [*_rows_of_layout(plan), *_rows_of_memory(plan)]),
    ("Largest buffers, by what they hold in turn", _rows_of_buffers(plan)),
    ("Collectives a step, of each device", _rows_of_collectives(plan)),
    ("One step", _rows_of_step(plan)),
    ("At published peaks; no latencies, nothing measured", _rows_of_speed(plan)),
  ]
  text = "\n\n".join(f"{title}\n{aligned(rows)}" for title, rows in sections)
  notes = [*_notes(plan), plan.refusal()]
  return "\n\n".join([text, *(note for note in notes if note)])


def lines(plans: Sequence[result.Plan]) -> str:
  """Returns a table with one row per plan of an evaluation or generation program."""
  rows: list[tuple[str, ...]] = [("also", "peak", "of", "ms", "bound by", "tokens at once")]
  for plan in plans:
    available = plan.overflow.available if plan.overflow else plan.topology.chip.usable
    sizes = result.gib(plan.memory.peak), result.gib(available)
    times = f"{plan.roofline.fastest * 1e3:,.3f}", plan.roofline.bound
    rows.append((plan.facts.name, *sizes, *times, f"{plan.facts.tokens:,}"))
  return "\n".join([aligned(rows), *(note for plan in plans for note in _doubts(plan))])


def _where(plan: result.Plan) -> str:
  topology = plan.topology
  slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
  return f"{slices}{topology.name}, {topology.chips:,} chips"


def _rows_of_layout(plan: result.Plan) -> list[tuple[str, ...]]:
  choices = {name: value for name, value in plan.facts.choices.items() if value != 1}
  if not choices:
    return []
  return [("layout", ", ".join(f"{name} {value}" for name, value in choices.items()), "")]


def _rows_of_memory(plan: result.Plan) -> list[tuple[str, ...]]:
  memory, available = plan.memory, plan.topology.chip.usable
  if plan.overflow:
    available = plan.overflow.available
  return [
    ("parameters", f"{plan.facts.parameters:,}", "trained, on all chips"),
    ("state", result.gib(plan.facts.state_bytes), f"a {plan.device}"),
    ("donated", "yes" if plan.donated else "NO", f"{result.gib(memory.aliased)} of the values"),
    ("temporaries", result.gib(memory.temporaries), f"a {plan.device}"),
    (
      "peak",
      result.gib(memory.peak),
      f"of {result.gib(available)} that a program may use: {memory.peak / available:.0%}",
    ),
  ]


def _rows_of_buffers(plan: result.Plan) -> list[tuple[str, ...]]:
  rows = [(result.gib(buffer.bytes), _cut(buffer.shapes)) for buffer in plan.largest[:5]]
  return rows or [("not reported",)]


def _rows_of_collectives(plan: result.Plan) -> list[tuple[str, ...]]:
  rows: list[tuple[str, ...]] = [("kind", "network", "group", "count", "GB", "ms on the wire")]
  for (kind, network, group), sums in collectives.by_kind(plan.collectives).items():
    gigabytes, milliseconds = sums["bytes"] / 1e9, sums["seconds"] * 1e3
    counted = (f"{group:,}", f"{sums['count']:,}", f"{gigabytes:,.3f}", f"{milliseconds:,.3f}")
    rows.append((kind, network, *counted))
  return rows if len(rows) > 1 else [("none",)]


def _rows_of_step(plan: result.Plan) -> list[tuple[str, ...]]:
  chip, times = plan.topology.chip, plan.roofline
  padded = plan.program_flops + plan.facts.padding_flops / plan.topology.devices
  share, padded_share = (
    flops / plan.model_flops if plan.model_flops else 0.0 for flops in (plan.program_flops, padded)
  )
  peaks = {
    "compute": f"{chip.peak / 1e12:,.0f} TFLOP/s",
    "memory": f"{chip.bandwidth / 1e9:,.0f} GB/s",
    "interconnect": f"{chip.link / 1e9:,.0f} GB/s a link and direction, {2 * chip.axes} links",
    "network": f"{chip.dcn / 1e9:,.2f} GB/s",
  }
  return [
    ("FLOPs of the model", f"{plan.model_flops:.4g}", f"a {plan.device}, analytic"),
    ("FLOPs of the program", f"{plan.program_flops:.4g}", f"{share:.2f} of the model's"),
    (
      "with padding",
      f"{padded:.4g}",
      f"{padded_share:.2f}, including padded blocks and lanes of attention",
    ),
    ("bytes of HBM", f"{plan.hbm_bytes:.4g}", f"a {plan.device}"),
    *(
      (name, f"{getattr(times, name) * 1e3:,.3f} ms", f"a chip has {figure}")
      for name, figure in peaks.items()
      if name != "network" or plan.topology.slices > 1
    ),
    ("bound by", times.bound, roofline.RESOURCES[times.bound]),
  ]


def _rows_of_speed(plan: result.Plan) -> list[tuple[str, ...]]:
  rows: list[tuple[str, ...]] = [("", "all overlaps", "nothing overlaps")]
  for label, form in (
    ("ms a step", lambda speed: f"{speed.seconds * 1e3:,.2f}"),
    ("tokens/s", lambda speed: f"{speed.tokens_per_second:,.0f}"),
    ("MFU", lambda speed: f"{speed.mfu:.1%}"),
    (f"days for {plan.facts.steps:,} steps", lambda speed: f"{speed.days:,.2f}"),
  ):
    rows.append((label, *(form(speed) for speed in plan.speeds)))
  return rows


def _notes(plan: result.Plan) -> list[str]:
  versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
  notes = [f"Compiled in {plan.compile_seconds:.0f} s by {versions}."]
  if plan.program_flops < plan.model_flops:
    notes.append(
      "The program computes less than the model's published count, which MFU is based on: an MFU "
      "above what compute allows, even above 100 %, is no mistake."
    )
  if plan.rematerialized:
    notes.append(f"Memory is short: XLA itself recomputes {plan.rematerialized:,} values.")
  if plan.kernels:
    kernels = ", ".join(f"{name} {count:,} times" for name, count in plan.kernels.items())
    source = "counted analytically" if plan.facts.kernel_flops else "not counted"
    notes.append(f"FLOPs of these kernels are {source}: {kernels}.")
  return notes + _doubts(plan)


def _doubts(plan: result.Plan) -> list[str]:
  if not plan.unknown_loops:
    return []
  return [f"Loops of unknown trip count, counted once: {', '.join(plan.unknown_loops)}."]


def _cut(text: str, width: int = 80) -> str:
  return text if len(text) <= width else f"{text[: width - 1]}…"


def aligned(rows: Sequence[Sequence[str]]) -> str:
  """Returns rows as lines with aligned columns."""
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = (
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for row in rows
  )
  return "\n".join(f"  {line}" for line in lines)
