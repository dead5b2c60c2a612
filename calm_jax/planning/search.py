"""A job -> layouts, compiled one by one in the order of predicted cost, and the fastest that fits.

Earlier results rule layouts out: one that recomputes more can't be faster than one that fits
on the same mesh, and one that keeps as much or more can't fit where a leaner one does not.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from calm_jax import config, errors
from calm_jax.models import remat
from calm_jax.planning import result, steps, tables

# Matrix products of a step by policy, relative to a step without recomputation; the forward pass is
# a third of them. Used to order layouts; the compiled program has the true count. `offload` is
# last, because the time of transfers to the host and back is unknown here.
_COMPUTED = {"none": 1.0, "dots": 1.1, "named": 1.2, "full": 1.33, "offload": 1.4}
# Policies, from the one that keeps most on the chip to the one that keeps least.
_LEANER = ("none", "dots", "named", "offload", "full")
_MOST_PARTS = 64
# A layout is tried if it is predicted to need at most this share of the memory.
_NEAR = 1.15


@dataclasses.dataclass(frozen=True)
class Layout:
  """The settings that a search changes."""

  mesh: config.Mesh
  accumulation: int
  remat: str

  @property
  def cost(self) -> float:
    """Predicted cost of a step, 1 for the plainest layout; each part gathers parameters again."""
    parts = 0.03 * math.log2(self.accumulation)
    cut = 0.10 * math.log2(self.mesh.sequence) + 0.15 * math.log2(self.mesh.tensor)
    return _COMPUTED[self.remat] + parts + cut + 0.001 * math.log2(self.mesh.data)

  def keeps_at_least(self, other: "Layout") -> bool:
    """Returns whether it certainly needs as much memory as another one on the same mesh."""
    leaner = _LEANER.index(self.remat) <= _LEANER.index(other.remat)
    return self.mesh == other.mesh and self.accumulation <= other.accumulation and leaner

  @property
  def flags(self) -> str:
    """The layout as flags of a command."""
    mesh = {f"mesh.{name}": size for name, size in dataclasses.asdict(self.mesh).items()}
    changed = {name: size for name, size in mesh.items() if size != 1 or name == "mesh.fsdp"}
    changed |= {"training.accumulation": self.accumulation, "execution.remat": self.remat}
    return " ".join(f"--config.{name}={value}" for name, value in changed.items())

  def applied(self, job: steps.PlanJob) -> steps.PlanJob:
    """Returns the job with this layout."""
    run = job.run
    return job.changed(
      mesh=self.mesh,
      training=dataclasses.replace(run.training, accumulation=self.accumulation),
      execution=dataclasses.replace(run.execution, remat=self.remat),
    )


@dataclasses.dataclass(frozen=True)
class Tried:
  """A layout with its plan, or the reason why it has none."""

  layout: Layout
  plan: result.Plan | None
  reason: str = ""

  @property
  def fits(self) -> bool:
    return self.plan is not None and self.plan.fits

  def figures(self) -> dict[str, Any]:
    """Returns the figures for JSON."""
    figures = dataclasses.asdict(self.layout)
    figures |= {"flags": self.layout.flags, "reason": self.reason}
    if self.plan is not None:
      times = self.plan.roofline
      figures |= {
        "fits": self.plan.fits,
        "peak": self.plan.memory.peak,
        "roofline": {**dataclasses.asdict(times), "bound": times.bound},
        "seconds": times.fastest,
        "slowest_seconds": times.slowest,
      }
    return figures


def layouts(job: steps.PlanJob) -> list[Layout]:
  """Returns the layouts that a job's batch, positions and heads allow, cheapest first."""
  allowed = [layout for layout in _possible(job) if _is_allowed(layout, job)]
  return sorted(allowed, key=lambda layout: layout.cost)


def _possible(job: steps.PlanJob) -> Iterator[Layout]:
  devices, slices = job.topology.devices, job.topology.slices
  powers = [2**power for power in range(int(math.log2(_MOST_PARTS)) + 1)]
  for sequence, tensor in itertools.product((1, 2), (1, 2)):
    for copies in (1, 4, 16):
      data = slices * copies
      rest, remainder = divmod(devices, data * sequence * tensor)
      if remainder or rest < 1:
        continue
      mesh = config.Mesh(data, rest, sequence, tensor)
      yield from (
        Layout(mesh, parts, kind) for parts, kind in itertools.product(powers, remat.POLICIES)
      )


def _is_allowed(layout: Layout, job: steps.PlanJob) -> bool:
  rows = layout.accumulation * layout.mesh.data * layout.mesh.fsdp
  if job.run.training.batch % rows or (job.transformer is None and layout.remat != "none"):
    return False
  heads = job.transformer.kv_heads if job.transformer else layout.mesh.tensor
  return job.positions % layout.mesh.sequence == 0 and heads % layout.mesh.tensor == 0


def search(job: steps.PlanJob, tries: int, report: Callable[[str], None]) -> list[Tried]:
  """Returns the layouts that were tried, at most `tries`, in order.

  Args:
    report: prints a line of progress.

  Raises:
    CalmError: if no layout divides the job evenly.
  """
  candidates = layouts(job)
  config.require(
    bool(candidates),
    f"no layout divides config.training.batch = {job.run.training.batch} over "
    f"{job.topology.devices} devices: give a batch that is a multiple of half of them or more",
  )
  tried: list[Tried] = []
  while candidates and len(tried) < tries:
    layout = candidates.pop(0)
    tried.append(_try(layout, job))
    report(f"{len(tried)}: {layout.flags}: {_line(tried[-1])}")
    candidates = [other for other in candidates if not _is_pointless(other, tried)]
  return tried


def _try(layout: Layout, job: steps.PlanJob) -> Tried:
  try:
    return Tried(layout, steps.train_plan(layout.applied(job)))
  except errors.CalmError as error:
    return Tried(layout, None, str(error))
  except jax.errors.JaxRuntimeError as error:
    return Tried(layout, None, f"does not compile: {str(error).splitlines()[0]}")


def _is_pointless(layout: Layout, tried: Sequence[Tried]) -> bool:
  """Returns whether a layout can't be the fastest that fits, given those tried."""
  for trial in tried:
    same_mesh = layout.mesh == trial.layout.mesh
    if trial.plan is None:
      ruled_out = same_mesh and layout.remat == trial.layout.remat
    elif trial.fits:
      ruled_out = same_mesh and layout.cost >= trial.layout.cost
    else:
      ruled_out = layout.keeps_at_least(trial.layout) or (same_mesh and _is_large(layout, trial))
    if ruled_out:
      return True
  # All meshes compute the same: if the best one is bound by compute, no other mesh is faster.
  fitting = [trial for trial in tried if trial.fits]
  best = min(fitting, key=_seconds, default=None)
  if best is None or best.plan is None or best.plan.roofline.bound != "compute":
    return False
  return _COMPUTED[layout.remat] >= _COMPUTED[best.layout.remat]


def _is_large(layout: Layout, refused: Tried) -> bool:
  """Returns whether a layout is too large, estimated from a refused layout's activations."""
  plan = refused.plan
  if plan is None or plan.overflow is None or layout.remat != refused.layout.remat:
    return False
  state = plan.facts.state_bytes
  activations = (plan.memory.peak - state) * refused.layout.accumulation / layout.accumulation
  return state + activations > _NEAR * plan.overflow.available


def _seconds(trial: Tried) -> tuple[float, float]:
  """Returns seconds per step with full overlap, and with none."""
  assert trial.plan
  return (trial.plan.roofline.fastest, trial.plan.roofline.slowest)


def _line(trial: Tried) -> str:
  if trial.plan is None:
    return trial.reason
  seconds, slowest = _seconds(trial)
  size = f"{'fits' if trial.fits else 'does not fit'}, {result.gib(trial.plan.memory.peak)}"
  return f"{size}, {seconds * 1e3:,.1f} to {slowest * 1e3:,.1f} ms, {trial.plan.roofline.bound}"


def table(tried: Sequence[Tried]) -> str:
  """Returns a table, one row per layout, the fastest that fits first, and the flags of that one."""
  mesh_axes = ("data", "fsdp", "sequence", "tensor")
  figures = ("fits", "peak", "ms", "serial ms", "bound by")
  rows: list[tuple[str, ...]] = [(*mesh_axes, "parts", "remat", *figures)]
  order = sorted(tried, key=lambda trial: (not trial.fits, _seconds(trial) if trial.plan else ()))
  for trial in order:
    mesh = map(str, dataclasses.astuple(trial.layout.mesh))
    lead = (*mesh, str(trial.layout.accumulation), trial.layout.remat)
    if trial.plan is None:
      rows.append((*lead, "no", trial.reason[:60], "", "", ""))
      continue
    fastest, slowest = (f"{seconds * 1e3:,.1f}" for seconds in _seconds(trial))
    peak, fits = result.gib(trial.plan.memory.peak), "yes" if trial.fits else "no"
    rows.append((*lead, fits, peak, fastest, slowest, trial.plan.roofline.bound))
  text = tables.aligned(rows)
  return f"{text}\n\nFastest that fits:\n  {order[0].layout.flags}" if order[0].fits else text


def nearest(tried: Sequence[Tried]) -> str:
  """Returns the refusal of the layout that needs least memory."""
  refused = [trial.plan for trial in tried if trial.plan and trial.plan.overflow]
  if not refused:
    return tried[-1].reason
  return min(refused, key=lambda plan: plan.memory.peak).refusal()
