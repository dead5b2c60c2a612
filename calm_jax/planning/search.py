"""A job -> layouts of it that are compiled one by one, and the fastest that fits.

Layouts are tried by a predicted cost, and left out where those before tell enough:
one that recomputes more can't be faster than one that fits on the same mesh, and one
that keeps as much or more can't fit where a leaner one does not.
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

# How much of a step's products is computed in all, its own included, by what is recomputed:
# a third of them is the forward pass. To order by; the compiled program tells the truth.
# Moving to the host and back comes last: what that takes is in no figure here.
_COMPUTED = {"none": 1.0, "dots": 1.1, "named": 1.2, "full": 1.33, "offload": 1.4}
# Policies in the order of what they keep on the chip.
_LEANER = ("none", "dots", "named", "offload", "full")
_MOST_PARTS = 64
# A layout is tried where it is predicted to need at most this much of what there is.
_NEAR = 1.15


@dataclasses.dataclass(frozen=True)
class Layout:
  """What a search changes."""

  mesh: config.Mesh
  accumulation: int
  remat: str

  @property
  def cost(self) -> float:
    """Predicted, of a step of the plainest layout: more parts gather parameters again."""
    parts = 0.03 * math.log2(self.accumulation)
    cut = 0.10 * math.log2(self.mesh.sequence) + 0.15 * math.log2(self.mesh.tensor)
    return _COMPUTED[self.remat] + parts + cut + 0.001 * math.log2(self.mesh.data)

  def keeps_at_least(self, other: "Layout") -> bool:
    """Tells whether it surely holds as much as another on the same mesh."""
    leaner = _LEANER.index(self.remat) <= _LEANER.index(other.remat)
    return self.mesh == other.mesh and self.accumulation <= other.accumulation and leaner

  @property
  def flags(self) -> str:
    mesh = {f"mesh.{name}": size for name, size in dataclasses.asdict(self.mesh).items()}
    changed = {name: size for name, size in mesh.items() if size != 1 or name == "mesh.fsdp"}
    changed |= {"training.accumulation": self.accumulation, "execution.remat": self.remat}
    return " ".join(f"--config.{name}={value}" for name, value in changed.items())

  def applied(self, job: steps.Job) -> steps.Job:
    """Returns the job laid out so."""
    run = job.run
    return job.changed(
      mesh=self.mesh,
      training=dataclasses.replace(run.training, accumulation=self.accumulation),
      execution=dataclasses.replace(run.execution, remat=self.remat),
    )


@dataclasses.dataclass(frozen=True)
class Tried:
  """A layout and what came of it: a plan, or why it was not compiled."""

  layout: Layout
  plan: result.Plan | None
  reason: str = ""

  @property
  def fits(self) -> bool:
    return self.plan is not None and self.plan.fits

  def figures(self) -> dict[str, Any]:
    """Returns what is written of it."""
    plan = self.plan
    measured = {} if plan is None else {
      "fits": plan.fits,
      "peak": plan.memory.peak,
      "roofline": {**dataclasses.asdict(plan.roofline), "bound": plan.roofline.bound},
      "seconds": plan.roofline.fastest,
      "slowest_seconds": plan.roofline.slowest,
    }  # fmt: skip
    return {**dataclasses.asdict(self.layout), "flags": self.layout.flags, "reason": self.reason,
            **measured}  # fmt: skip


def layouts(job: steps.Job) -> list[Layout]:
  """Returns the layouts that a job's batch, positions and heads allow, the cheapest first."""
  found = [layout for layout in _possible(job) if _allowed(layout, job)]
  return sorted(found, key=lambda layout: layout.cost)


def _possible(job: steps.Job) -> Iterator[Layout]:
  devices, slices = job.topology.devices, job.topology.slices
  powers = [2**power for power in range(int(math.log2(_MOST_PARTS)) + 1)]
  for sequence, tensor in itertools.product((1, 2), (1, 2)):
    for copies in (1, 4, 16):
      data = slices * copies
      rest, left = divmod(devices, data * sequence * tensor)
      if left or rest < 1:
        continue
      mesh = config.Mesh(data, rest, sequence, tensor)
      yield from (
        Layout(mesh, parts, kind) for parts, kind in itertools.product(powers, remat.POLICIES)
      )


def _allowed(layout: Layout, job: steps.Job) -> bool:
  rows = layout.accumulation * layout.mesh.data * layout.mesh.fsdp
  if job.run.training.batch % rows or (job.run.stage == "autoencoder" and layout.remat != "none"):
    return False
  heads = getattr(job.run.model, "kv_heads", layout.mesh.tensor)
  return job.positions % layout.mesh.sequence == 0 and heads % layout.mesh.tensor == 0


def search(job: steps.Job, tries: int, report: Callable[[str], None]) -> list[Tried]:
  """Returns what was tried, at most `tries` layouts.

  Raises:
    CalmError: where no layout divides the job evenly.
  """
  candidates = layouts(job)
  config.require(
    bool(candidates),
    f"no layout divides config.training.batch = {job.run.training.batch} over "
    f"{job.topology.devices} devices: give a batch that is a multiple of half of them or more",
  )
  found: list[Tried] = []
  while candidates and len(found) < tries:
    layout = candidates.pop(0)
    found.append(_tried(layout, job))
    report(f"{len(found)}: {layout.flags}: {_told(found[-1])}")
    candidates = [other for other in candidates if not _pointless(other, found)]
  return found


def _tried(layout: Layout, job: steps.Job) -> Tried:
  try:
    return Tried(layout, steps.train_plan(layout.applied(job)))
  except errors.CalmError as error:
    return Tried(layout, None, str(error))
  except jax.errors.JaxRuntimeError as error:
    return Tried(layout, None, f"does not compile: {str(error).splitlines()[0]}")


def _pointless(layout: Layout, found: Sequence[Tried]) -> bool:
  """Tells whether a layout can't be the fastest that fits, by what was tried."""
  for one in found:
    same_mesh = layout.mesh == one.layout.mesh
    if one.plan is None:
      ruled_out = same_mesh and layout.remat == one.layout.remat
    elif one.fits:
      ruled_out = same_mesh and layout.cost >= one.layout.cost
    else:
      ruled_out = layout.keeps_at_least(one.layout) or (same_mesh and _too_large(layout, one))
    if ruled_out:
      return True
  # Compute is the same on every mesh: where the best is bound by it, another only adds.
  fitting = [one for one in found if one.fits]
  best = min(fitting, key=_seconds, default=None)
  if best is None or best.plan is None or best.plan.roofline.bound != "compute":
    return False
  return _COMPUTED[layout.remat] >= _COMPUTED[best.layout.remat]


def _too_large(layout: Layout, refused: Tried) -> bool:
  """Tells whether more parts than a refused layout's are still too few, by its activations."""
  plan = refused.plan
  if plan is None or plan.overflow is None or layout.remat != refused.layout.remat:
    return False
  state = plan.facts.state_bytes
  activations = (plan.memory.peak - state) * refused.layout.accumulation / layout.accumulation
  return state + activations > _NEAR * plan.overflow.available


def _seconds(one: Tried) -> tuple[float, float]:
  assert one.plan
  return (one.plan.roofline.fastest, one.plan.roofline.slowest)


def _told(one: Tried) -> str:
  if one.plan is None:
    return one.reason
  seconds, slowest = _seconds(one)
  held = f"{'fits' if one.fits else 'does not fit'}, {result.gib(one.plan.memory.peak)}"
  return f"{held}, {seconds * 1e3:,.1f} to {slowest * 1e3:,.1f} ms, {one.plan.roofline.bound}"


def table(found: Sequence[Tried]) -> str:
  """Returns what was tried, the fastest that fits first, and what to take."""
  rows: list[tuple[str, ...]] = [
    ("data", "fsdp", "sequence", "tensor", "parts", "remat", "fits", "peak", "ms", "serial ms",
     "bound by"),
  ]  # fmt: skip
  order = sorted(found, key=lambda one: (not one.fits, _seconds(one) if one.plan else ()))
  for one in order:
    mesh = map(str, dataclasses.astuple(one.layout.mesh))
    lead = (*mesh, str(one.layout.accumulation), one.layout.remat)
    if one.plan is None:
      rows.append((*lead, "no", one.reason[:60], "", "", ""))
      continue
    fastest, slowest = (f"{seconds * 1e3:,.1f}" for seconds in _seconds(one))
    peak, fits = result.gib(one.plan.memory.peak), "yes" if one.fits else "no"
    rows.append((*lead, fits, peak, fastest, slowest, one.plan.roofline.bound))
  text = tables.aligned(rows)
  return f"{text}\n\nFastest that fits:\n  {order[0].layout.flags}" if order[0].fits else text


def nearest(found: Sequence[Tried]) -> str:
  """Returns by how much the leanest layout does not fit."""
  refused = [one.plan for one in found if one.plan and one.plan.overflow]
  if not refused:
    return found[-1].reason
  return min(refused, key=lambda plan: plan.memory.peak).refusal()
