"""Batch -> new state: gradients, accumulation, the update, and skipping a non-finite one."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import optax
from jax import numpy as jnp

from calm_jax import config
from calm_jax.parallel import mesh, rules
from calm_jax.training import optimizer

Params = Any
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
# (params, frozen, batch, key) -> (mean loss, metrics). Metrics are means over the batch,
# except `tokens`, the number of tokens that the loss is averaged over.
Loss = Callable[[Params, Params, Batch, jax.Array], tuple[jax.Array, Metrics]]


@flax.struct.dataclass
class TrainState:
  """All that a resumed run needs besides the data position.

  Attributes:
    step: number of optimizer steps, skipped ones included.
    skipped: number of skipped steps.
    skipped_in_a_row: number of skipped steps since the last finite one.
  """

  params: Params
  optimizer: Any
  step: jax.Array
  skipped: jax.Array
  skipped_in_a_row: jax.Array


def new_state(params: Params, settings: config.Optimizer) -> TrainState:
  """Returns the state before the first step."""
  return TrainState(
    params=params,
    optimizer=optimizer.transformation(settings).init(params),
    step=jnp.int32(0),
    skipped=jnp.int32(0),
    skipped_in_a_row=jnp.int32(0),
  )


def _split(x_B: jax.Array, parts: int) -> jax.Array:
  """Splits the batch axis, [B, ...] -> [parts, B / parts, ...]."""
  split = x_B.reshape(-1, parts, *x_B.shape[1:]).swapaxes(0, 1)
  return mesh.constrain(split, None, "batch", *(None,) * (x_B.ndim - 1))


def accumulated_gradients(
  loss: Loss, params: Params, frozen: Params, batch: Batch, key: jax.Array, parts: int
) -> tuple[Params, Metrics]:
  """Returns gradients and metrics of the batch, accumulated over `parts` parts by a scan.

  Part p takes rows p, p + parts, ..., so that every device works on rows of its own.
  Parts are weighted by their `tokens`, so the result equals that of the full batch
  even if parts hold different numbers of tokens. Metrics gain `loss`.
  """

  def gradients(part):
    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, frozen, part, key)
    weight = metrics["tokens"].astype(jnp.float32)
    metrics = jax.tree.map(lambda x: x * weight, {**metrics, "loss": value})
    return (rules.constrain(jax.tree.map(lambda x: x * weight, grads)), metrics), weight

  if parts == 1:
    sums, weight = gradients(batch)
  else:
    split = jax.tree.map(lambda x: _split(x, parts), batch)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], split)),
    )

    def add(total, part):
      return jax.tree.map(jnp.add, total, gradients(part)), None

    ((grads, metrics), weight), _ = jax.lax.scan(add, zeros, split)
    sums = (rules.constrain(grads), metrics)
  grads, metrics = jax.tree.map(lambda x: x / weight, sums)
  metrics["tokens"] = weight
  return grads, metrics


# (state, frozen, batch) -> (state, metrics).
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]


def make_step(loss: Loss, settings: config.Optimizer, training: config.Training) -> Step:
  """Returns the pure function that takes an optimizer step.

  If the loss or the gradient norm is not finite, parameters and optimizer state are left
  unchanged; the step is counted, and counted as skipped.
  """
  tx = optimizer.transformation(settings)
  rate = optimizer.schedule(settings, training.steps)

  def take(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.key(training.seed)
    grads, metrics = accumulated_gradients(
      loss, state.params, frozen, batch, key, training.accumulation
    )
    gradient_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(gradient_norm)
    directions, new_optimizer = tx.update(grads, state.optimizer, state.params)
    learning_rate = rate(state.step)
    updates = jax.tree.map(lambda u: -learning_rate * u, directions)
    new_params = optax.apply_updates(state.params, updates)
    new_state = TrainState(
      params=_where(is_finite, new_params, state.params),
      optimizer=_where(is_finite, new_optimizer, state.optimizer),
      step=state.step + 1,
      skipped=state.skipped + jnp.where(is_finite, 0, 1),
      skipped_in_a_row=jnp.where(is_finite, 0, state.skipped_in_a_row + 1),
    )
    return new_state, metrics | {
      "finite": is_finite,
      "gradient_norm": gradient_norm,
      "parameter_norm": optax.tree.norm(state.params),
      "update_norm": optax.tree.norm(updates),
      "learning_rate": learning_rate,
      "skipped": new_state.skipped,
      "skipped_in_a_row": new_state.skipped_in_a_row,
    }

  return take


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
  """Returns `new` where the scalar condition is true, else `old`, for whole trees."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


# What a process can signal to all others with each step, in the order of the columns.
SIGNALS = ("stop", "save", "void")


def with_signals(take: Step) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns a step by which processes agree: (state, frozen, batch, signals) -> (state, metrics).

  `signals` is int32 [devices, 3] with the columns SIGNALS: 1 where the device's process
  raises the signal. The maximum of each column is returned among the metrics, equal on
  all processes. A void step leaves the state unchanged, so that a process without a batch
  can take part; its other metrics are undefined.
  """

  def agree(
    state: TrainState, frozen: Params, batch: Batch, signals: jax.Array
  ) -> tuple[TrainState, Metrics]:
    raised = dict(zip(SIGNALS, jnp.max(signals, axis=0), strict=True))
    new_state, metrics = take(state, frozen, batch)
    return _where(raised["void"] > 0, state, new_state), metrics | raised

  return agree


def parts(state: TrainState) -> tuple[Params, dict[str, Any]]:
  """Returns (parameters, the rest): the two items of a checkpoint."""
  return state.params, {
    "optimizer": state.optimizer,
    "step": state.step,
    "skipped": state.skipped,
    "skipped_in_a_row": state.skipped_in_a_row,
  }
