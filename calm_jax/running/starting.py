"""Settings and a workdir -> a run ready to start or resume there, with all inputs checked."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from etils import epath

from calm_jax import config, distributed, errors, files, resolve, workdir
from calm_jax.data import pipeline, synthetic
from calm_jax.data import store as store_lib
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.running import loading
from calm_jax.stages import table
from calm_jax.training import checkpoint, evaluation, optimizer, program, resuming, stage
from calm_jax.training import trained as trained_lib


@dataclasses.dataclass(frozen=True)
class Start:
  """A run that is ready to start; nothing is written yet.

  Attributes:
    functions: functions of its stage for the loop.
    positions: P, positions per example.
    parents: the loaded parents.
    parent_sources: the folders that they were loaded from.
    initial: parameters to start from; None for the stage's initial values.
  """

  run: Any
  store: store_lib.TokenStore
  origin: workdir.Origin
  functions: stage.Stage
  positions: int
  parents: Mapping[str, trained_lib.Trained]
  parent_sources: Mapping[str, str]
  initial: Any

  @property
  def tokenizer(self) -> epath.Path:
    return epath.Path(self.store.path) / self.store.manifest.tokenizer.file

  @property
  def parent_runs(self) -> dict[str, Any]:
    """Settings of the parents and of theirs, by name."""
    return trained_lib.runs(self.parents)

  def copy_parents(self, directory: str) -> None:
    """Writes the parents into a new workdir.

    Raises:
      CalmError: if they can't be written.
    """
    for name, parent in self.parents.items():
      target = str(epath.Path(directory) / name)
      trained_lib.copy_parent(parent, name, self.parent_sources[name], target)


def prepare(run: Any, directory: str, allow_config_change: bool) -> Start:
  """Returns a run with its data and parents, checked to fit each other on all processes.

  Raises:
    CalmError: for settings, data, parents or a workdir that don't fit each other.
  """
  store = distributed.together("input", lambda: _store(run, directory, allow_config_change))
  distributed.require_same("config", resolve.digest(run))
  distributed.require_same("data", store.hash)
  is_started = workdir.exists(directory)
  state = "started" if is_started else "new"
  distributed.require_same("--workdir", f"{directory} ({state})")
  start = _build(run, store, directory, is_started)
  _require_fitting(start)
  if is_started:
    workdir.require_same_data(directory, start.origin)
  return start


def _store(run: Any, directory: str, allow_config_change: bool) -> store_lib.TokenStore:
  """Returns the data of a run, after checking that it may start or resume in the workdir."""
  files.require_reachable(directory)
  checkpoint.require_writable_name(directory)
  if workdir.exists(directory):
    workdir.require_intact(directory)
    workdir.require_trainable(directory)
    resuming.require_checkpoints(directory)
    _require_same_config(run, directory, allow_config_change)
  elif checkpoint.steps_in(directory):
    raise errors.CalmError(
      f"{directory} holds checkpoints, but no config.json: restore it, or give a new --workdir"
    )
  config.require(
    bool(run.data.path),
    "config.data.path is empty: give --config.data.path=DIR, written by calm_jax.prepare",
  )
  store = synthetic.open_store(run.data.path)
  store.require_tokenizer()  # Its copy in the workdir is used from then on.
  return store


def _require_same_config(run: Any, directory: str, allow_change: bool) -> None:
  """Raises CalmError if `run` differs from the workdir's run in settings that must not change."""
  differing = {
    name: values
    for name, values in resolve.differences(loading.read_run(directory), run).items()
    if name.partition(".")[0] not in resolve.FREE
  }
  fixed = any(
    resolve.is_fixed(name) or resolve.is_switched(name, *values)
    for name, values in differing.items()
  )
  if not differing or (allow_change and not fixed):
    return
  changes = "; ".join(f"{name}: {before!r}, {now!r}" for name, (before, now) in differing.items())
  ways = "a new --workdir or the stored settings"
  raise errors.CalmError(
    f"{directory} was started with another config (stored, given): {changes}. Give {ways}"
    + ("" if fixed else ", or --allow_config_change")
  )


def _build(run: Any, store: store_lib.TokenStore, directory: str, is_started: bool) -> Start:
  """Returns a run with its data, its parents and the weights that it starts from."""
  spec, own_origin = table.of(run), workdir.read_origin(directory) if is_started else None
  source, resumes = None, is_started and trained_lib.has_checkpoint(directory)
  if run.start_from and not resumes:
    source = _weights_to_start_from(run, store)
  folders = {
    name: _parent_source(run, name, directory, is_started, source) for name in spec.parents
  }
  parents = dict(source.parents) if source and not is_started else {}
  for name, folder in folders.items():
    if name not in parents:
      parents[name] = loading.load(folder, spec.parents[name], run.training.compute_dtype)
    workdir.require_same_tokenizer(parents[name].origin, store, folder)
  # Loaded weights keep their vocabulary, which may be padded above the tokenizer's.
  loaded_origin = own_origin or (source.origin if source else None)
  origins = [loaded_origin, *(parent.origin for parent in parents.values())]
  sizes = [origin.vocab_size for origin in origins if origin]
  vocab_size = sizes[0] if sizes else store.manifest.tokenizer.vocab_size
  labels = {name: (f"the {name} in {path}", f"--config.{name}") for name, path in folders.items()}
  spec.check(run, trained_lib.runs(parents), vocab_size, labels)
  patch_size = spec.patch_size(run)
  fingerprints = {name: parent.fingerprint for name, parent in parents.items()}
  model = spec.model(run, parents, vocab_size, run.training.compute_dtype)
  initial = spec.continued(model, source.params) if source else None
  if initial is None and spec.initial and not resumes:
    initial = spec.initial(run, model, parents)
  return Start(
    run=run,
    store=store,
    origin=workdir.Origin.of(store, patch_size, vocab_size, fingerprints),
    functions=spec.stage(run, model, parents),
    positions=run.data.context // patch_size,
    parents=parents,
    parent_sources=folders,
    initial=initial,
  )


def _weights_to_start_from(run: Any, store: store_lib.TokenStore) -> trained_lib.Trained:
  """Returns the trained stage in `start_from`; CalmError if `run` can't start from it."""
  source = loading.load(run.start_from, run.stage, run.training.compute_dtype)
  workdir.require_same_tokenizer(source.origin, store, run.start_from)
  spec, required_values = table.of(run), {}
  free = {"start_from", *spec.parents, *spec.unshaped(run)}
  for name, (stored, _) in resolve.differences(source.run, run).items():
    if resolve.is_fixed(name) and name not in free:
      required_values[name] = stored
  config.require(
    not required_values,
    f"the weights in {run.start_from} are of another size: give "
    + " ".join(f"--config.{name}={stored}" for name, stored in required_values.items()),
  )
  return source


def _parent_source(
  run: Any, name: str, directory: str, is_started: bool, source: trained_lib.Trained | None
) -> str:
  """Returns the folder that a parent is loaded from."""
  setting = getattr(run, name)
  config.require(
    not (run.start_from and setting),
    f"config.{name} is {setting!r}, but config.start_from is set and its own {name} is used: "
    f"leave config.{name} out",
  )
  if is_started:
    return str(epath.Path(directory) / name)
  if source:
    return str(epath.Path(run.start_from) / name)
  stage_name = table.of(run).parents[name]
  config.require(
    bool(setting),
    f"config.{name} is empty: give --config.{name}=W, the workdir of "
    f"{table.STAGES[stage_name].title}",
  )
  return setting


def _require_fitting(start: Start) -> None:
  """Raises CalmError unless context, schedule, mesh and data fit the settings."""
  run, spec = start.run, table.of(start.run)
  evaluation.require_context(run.data.context, spec.patch_size(run), "config.data.context")
  optimizer.schedule(run.optimizer, run.training.steps)
  program.require_divisible(run, start.positions, spec.transformer(run), mesh_lib.current())
  if run.training.eval_every:
    advice = ", or train with --config.training.eval_every=0"
    pipeline.require_heldout(start.store, advice)


def remarks(run: Any, store: store_lib.TokenStore) -> list[str]:
  """Returns warnings about a length or an amount of data that may be unintended."""
  settings, warmup = run.training, run.optimizer.warmup_steps
  lines, blocks = [], store.num_tokens("train") // run.data.context
  if settings.steps < warmup:
    lines.append(
      f"training.steps = {settings.steps:,} ends inside the warmup, optimizer.warmup_steps = "
      f"{warmup:,}: the learning rate reaches {settings.steps / warmup:.1%} of its peak"
    )
  epochs = settings.steps * settings.batch / max(1, blocks)
  if epochs > 1 and not run.data.reuse_batch:
    lines.append(
      f"{settings.steps:,} steps of {settings.batch:,} examples are {epochs:.2f} epochs: the data "
      f"holds {blocks:,} examples of {run.data.context:,} tokens"
    )
  return lines + pipeline.few_blocks_warnings(store, run.data.context, bool(settings.eval_every))


def next_command(run: Any, directory: str, size: str) -> str:
  """Returns lines that name the command to run after training.

  Args:
    size: size in the config file of the stage that is trained on this one.
  """
  path = shlex.quote(directory)
  if table.of(run).writing:
    return (
      f"next: python -m calm_jax.evaluate --workdir={path}\n"
      f"      python -m calm_jax.generate --workdir={path} --prompt=TEXT"
    )
  for stage_name, spec in table.STAGES.items():
    for name, parent_stage in spec.parents.items():
      if parent_stage == run.stage:
        return (
          f"next: python -m calm_jax.main --config={stage_name}.py:{size} "
          f"--config.data.path={shlex.quote(run.data.path)} --config.{name}={path}"
          f"{_patch_size_flag(run, spec)} --workdir=DIR"
        )
  return f"next: python -m calm_jax.evaluate --workdir={path}"


def _patch_size_flag(run: Any, child: Any) -> str:
  """Returns the flag that gives a child stage the K of its parent, "" if K is the default."""
  k = table.of(run).patch_size(run)
  return "" if k == child.patch_size(child.run()) else f" --config.model.patch_size={k}"
