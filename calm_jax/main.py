"""The act of training: `python -m calm_jax.main --config=configs/STAGE.py:SIZE --workdir=W`.

Run again with the same flags, it goes on from the newest good checkpoint. One job at a time
trains in a workdir; a second is refused.
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

# Until the guard stands: a machine may be taken away while JAX is imported, too.
if __name__ == "__main__":
  signal.signal(signal.SIGTERM, lambda *_: os._exit(75))  # errors.EXIT_RESTART

import jax
from absl import flags
from etils import epath

from calm_jax import cli, config, distributed, errors, files, lease, run_flags, workdir
from calm_jax.data import pipeline, synthetic
from calm_jax.data import store as store_lib
from calm_jax.models import attention, flops
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.parallel import rules
from calm_jax.training import (
  autoencoder_stage,
  calm_stage,
  checkpoint,
  evaluation,
  metrics,
  optimizer,
  program,
  resuming,
  stages,
  train,
  transformer_stage,
)
from calm_jax.training import guard as guard_lib

run_flags.define()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of this run: checkpoints, metrics, the resolved config."
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
  "allow_config_change", False, "Go on in a workdir whose stored config differs."
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Check everything and compile the step, then end: nothing is written."
)
_PRINT_SHARDINGS = flags.DEFINE_bool(
  "print_shardings", False, "Print how every parameter lies on the devices."
)

# Folder of a workdir for compiled programs, where JAX is not told another place.
COMPILED = "compiled"


@dataclasses.dataclass(frozen=True)
class Built:
  """A run made ready over its data, nothing written yet.

  Attributes:
    codec: the sizes of the autoencoder, if there is one.
    initial: parameters to start from in place of the stage's own initial values.
    copy: writes what a new workdir holds besides its own config and checkpoints.
  """

  stage: stages.Stage
  origin: workdir.Origin
  codec: config.Autoencoder | None
  initial: Any = None
  copy: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Given:
  """What a run is built from besides its settings.

  Attributes:
    source: what `start_from` holds, where the run has no checkpoint of its own yet.
    begun: the workdir's own origin, where it was started before.
  """

  store: store_lib.TokenStore
  directory: str
  source: workdir.Trained | None
  begun: workdir.Origin | None

  @classmethod
  def of(cls, run: config.Run, store: store_lib.TokenStore, directory: str) -> "Given":
    """Raises CalmError for a `start_from` that `run` can't start from."""
    begun = workdir.read_origin(directory) if workdir.exists(directory) else None
    if not run.start_from or (begun and workdir.has_checkpoint(directory)):
      return cls(store, directory, None, begun)
    source = workdir.load(run.start_from, run.stage)
    workdir.require_same_tokenizer(source.origin, store, run.start_from)
    differing = config.differences(source.run, run)
    wrong = {name: there for name, (there, _) in differing.items() if config.shapes(name, run)}
    config.require(
      not wrong,
      f"the weights in {run.start_from} are of another size: give "
      + " ".join(f"--config.{name}={there}" for name, there in wrong.items()),
    )
    return cls(store, directory, source, begun)

  @property
  def initial(self) -> Any:
    """The weights to start from, or None."""
    return self.source.params if self.source else None

  def vocab_size(self, otherwise: int) -> int:
    """Of the model: that of the weights it goes on from, which may have been padded."""
    before = self.begun or (self.source and self.source.origin)
    return before.vocab_size if before else otherwise


def _autoencoder(run: config.AutoencoderRun, given: Given) -> Built:
  vocab_size = given.vocab_size(given.store.manifest.tokenizer.vocab_size)
  replacement = run.loss.drop_token_id
  config.require(
    0 <= replacement < vocab_size,
    f"config.loss.drop_token_id must lie in [0, {vocab_size}), the vocabulary, got {replacement}",
  )
  origin = workdir.Origin.of(given.store, run.model.patch_size, vocab_size)
  return Built(autoencoder_stage.build(run, vocab_size), origin, run.model, given.initial)


def _calm(run: config.CalmRun, given: Given) -> Built:
  own = str(epath.Path(given.directory) / workdir.AUTOENCODER)
  config.require(
    not (run.start_from and run.autoencoder),
    f"config.autoencoder is {run.autoencoder!r} beside config.start_from, whose own autoencoder "
    "is taken: leave it out",
  )
  source = run.autoencoder
  if given.begun:
    source = own
  elif given.source:
    source = str(epath.Path(run.start_from) / workdir.AUTOENCODER)
  config.require(
    bool(source),
    "config.autoencoder is empty: give --config.autoencoder=W, the workdir of stage one",
  )
  codec = workdir.load_autoencoder(source)
  config.require_same_patches(
    run, codec.run.model, f"the autoencoder in {source}", "--config.autoencoder"
  )
  workdir.require_same_tokenizer(codec.origin, given.store, source)
  vocab_size = given.vocab_size(codec.origin.vocab_size)
  origin = workdir.Origin.of(given.store, codec.run.model.patch_size, vocab_size, codec.fingerprint)
  module = codec.module(run.training.compute_dtype)
  return Built(
    calm_stage.build(run, module, codec.params, vocab_size),
    origin,
    codec.run.model,
    given.initial,
    lambda: workdir.copy_autoencoder(codec, source, own),
  )


def _transformer(run: config.TransformerRun, given: Given) -> Built:
  vocab_size = given.vocab_size(given.store.manifest.tokenizer.vocab_size)
  origin = workdir.Origin.of(given.store, 1, vocab_size)
  return Built(transformer_stage.build(run, vocab_size), origin, None, given.initial)


BUILDERS: dict[str, Callable[..., Built]] = {
  "autoencoder": _autoencoder,
  "calm": _calm,
  "transformer": _transformer,
}


def _require_fitting(run: config.Run, patch_size: int) -> None:
  evaluation.require_context(run.data.context, patch_size, "config.data.context")
  optimizer.schedule(run.optimizer, run.training.steps)
  program.require_divisible(run, run.data.context // patch_size, mesh_lib.current())


def _require_same_config(run: config.Run, directory: str, allow_change: bool) -> None:
  """Raises CalmError where `run` may not go on in a workdir that has begun."""
  differing = {
    name: values
    for name, values in config.differences(workdir.read_run(directory), run).items()
    if name.partition(".")[0] not in config.FREE
  }
  fixed = [name for name in differing if name.partition(".")[0] in config.FIXED]
  if not differing or (allow_change and not fixed):
    return
  told = "; ".join(f"{name}: {before!r}, {now!r}" for name, (before, now) in differing.items())
  ways = "a new --workdir or the stored settings"
  raise errors.CalmError(
    f"{directory} was started with another config (stored, given): {told}. Give {ways}"
    + ("" if fixed else ", or --allow_config_change")
  )


@dataclasses.dataclass(frozen=True)
class Options:
  """What of a run is asked besides its settings: the flags of the same names."""

  allow_config_change: bool = False
  dry_run: bool = False
  print_shardings: bool = False


def train_run(
  run: config.Run,
  directory: str,
  options: Options = Options(),
  guard: guard_lib.Guard | None = None,
) -> None:
  """Trains `run` in a workdir, new or to be continued.

  Raises:
    CalmError: for settings, data, devices or a workdir that don't fit each other,
      or while another process trains there; nothing is written then.
    Interrupted: after Ctrl-C or SIGTERM, once the state is saved.
  """
  around = contextlib.nullcontext(guard) if guard else guard_lib.Guard(run.limits)
  lent = contextlib.nullcontext() if options.dry_run else _held(directory)
  with around as guard, jax.set_mesh(mesh_lib.build(run.mesh)), lent as held:
    _train_on_mesh(run, directory, options, guard, held)


@contextlib.contextmanager
def _held(directory: str) -> Iterator[lease.Lease]:
  """Keeps other jobs out of a workdir; process 0 does it for all of this one."""
  held = lease.Lease(lease.of_folder(directory), f"--workdir={directory}")

  def take() -> float:
    files.require_reachable(directory)
    return held.attempt()

  try:
    # In turns, so that no process waits for long without a word from another.
    while wait := distributed.first_number("lease", take):
      time.sleep(wait)
    with distributed.before_exit(held.release):
      yield held
  finally:
    held.release()


def _store_of(run: config.Run, directory: str, allow_change: bool) -> store_lib.TokenStore:
  """Returns the data of a run that may begin, or go on, in a workdir."""
  files.require_reachable(directory)
  checkpoint.require_writable_name(directory)
  if workdir.exists(directory):
    workdir.require_whole(directory)
    workdir.require_trainable(directory)
    resuming.require_checkpoints(directory)
    _require_same_config(run, directory, allow_change)
  elif checkpoint.steps_in(directory):
    raise errors.CalmError(
      f"{directory} holds checkpoints, but no config.json: put it back, or give a new --workdir"
    )
  config.require(
    bool(run.data.path),
    "config.data.path is empty: give --config.data.path=DIR, written by calm_jax.prepare",
  )
  store = synthetic.open_store(run.data.path)
  store.require_tokenizer()  # It is copied, and written with from then on.
  return store


def _built(run: config.Run, directory: str, allow_change: bool) -> tuple[Built, Any]:
  """Returns a run and its data, found to fit each other on all processes."""
  store = distributed.together("input", lambda: _store_of(run, directory, allow_change))
  distributed.require_same("config", config.digest(run))
  distributed.require_same("data", store.hash)
  begun = workdir.exists(directory)
  distributed.require_same("--workdir", f"{directory} ({'begun' if begun else 'new'})")
  built = BUILDERS[run.stage](run, Given.of(run, store, directory))
  _require_fitting(run, built.codec.patch_size if built.codec else 1)
  if run.training.eval_every:
    pipeline.require_heldout(store, ", or train with --config.training.eval_every=0")
  if begun:
    workdir.require_same_data(directory, built.origin)
  return built, store


def _describe(
  run: config.Run, built: Built, stage_program: program.Program, print_shardings: bool
) -> None:
  """Says on what the run is computed, and refuses what is not divided."""
  mesh, params = stage_program.mesh, stage_program.state.params
  whole = rules.require_sharded(params, mesh)
  count = sum(x.size for x in jax.tree.leaves(params))
  axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
  kernel = "none"
  if not isinstance(run, config.AutoencoderRun):
    patch = built.codec.patch_size if built.codec else 1
    positions, dtype = run.data.context // patch, run.training.compute_dtype
    kernel = attention.choose(run.execution.attention, positions, dtype)
  metrics.show(
    f"mesh {axes}, {mesh.size} of {jax.device_count()} devices; attention {kernel}, remat "
    f"{run.execution.remat}; {count:,} parameters, {whole:.2%} of their bytes whole on each device"
  )
  if print_shardings:
    metrics.show(rules.table(rules.placed(params, mesh)))


def remarks(run: config.Run, store: store_lib.TokenStore) -> list[str]:
  """Returns, a line each, what of a run's length and data its owner may not have meant."""
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
      f"hold {blocks:,} examples of {run.data.context:,} tokens"
    )
  return lines + list(pipeline.of_few_blocks(store, run.data.context, bool(settings.eval_every)))


def next_command(run: config.Run, directory: str, size: str) -> str:
  """Returns what to do with a finished run, for people.

  Args:
    size: of configs/calm.py, for a finished autoencoder.
  """
  place = shlex.quote(directory)
  if not isinstance(run, config.AutoencoderRun):
    return (
      f"next: python -m calm_jax.evaluate --workdir={place}\n"
      f"      python -m calm_jax.generate --workdir={place} --prompt=TEXT"
    )
  k = run.model.patch_size
  other = f" --config.model.patch_size={k}" if k != config.Backbone.patch_size else ""
  return (
    f"next: python -m calm_jax.main --config=configs/calm.py:{size} "
    f"--config.data.path={shlex.quote(run.data.path)} --config.autoencoder={place}"
    f"{other} --workdir=DIR"
  )


def _train_on_mesh(
  run: config.Run,
  directory: str,
  options: Options,
  guard: guard_lib.Guard,
  held: lease.Lease | None,
) -> None:
  built, store = _built(run, directory, options.allow_config_change)
  stage_program = program.Program(run, built.stage, mesh_lib.current())
  _describe(run, built, stage_program, options.print_shardings)
  for line in remarks(run, store):
    metrics.show(line)
  guard.ledger.part("read input")
  if held is None:
    metrics.show(program.memory_line(stage_program.compiled_step()))
    metrics.show(f"dry run: nothing was trained or written; {run.training.steps} steps would be")
    return
  per_token = flops.train_per_token(run, built.codec, built.origin.vocab_size)
  record = {"config": dataclasses.asdict(run), "origin": dataclasses.asdict(built.origin)}
  trainer = train.Trainer(
    run, built.stage, store, directory, per_token, record, built.initial, guard, held
  )
  built = dataclasses.replace(built, initial=None)  # Held by the trainer alone, until it begins.
  _begin(run, directory, built, epath.Path(store.path) / store.manifest.tokenizer.file)
  distributed.together("workdir seen", lambda: _require_shared(directory))
  trainer.train()


def _begin(run: config.Run, directory: str, built: Built, tokenizer: epath.Path) -> None:
  """Makes a new workdir, or gives one that has begun the settings that it goes on with."""
  if workdir.exists(directory):
    distributed.on_first("workdir", lambda: workdir.change_config(directory, run))
    return
  built.copy()
  made = workdir.sealed(directory, run, built.origin, tokenizer)
  distributed.on_first(
    "workdir", lambda: workdir.create(directory, run, built.origin, tokenizer, made)
  )


def _require_shared(directory: str) -> None:
  config.require(
    workdir.exists(directory),
    f"--workdir={directory}, which process 0 has written, can't be seen from here: give a folder "
    "that all machines share, or a bucket",
  )


def main() -> None:
  run = run_flags.run()
  if run is None or not _WORKDIR.value:
    raise errors.CalmError("give --config=configs/STAGE.py[:SIZE] and --workdir=DIR")
  options = Options(_ALLOW_CONFIG_CHANGE.value, _DRY_RUN.value, _PRINT_SHARDINGS.value)
  cache = jax.config.values["jax_compilation_cache_dir"]
  if cache is None and not options.dry_run:
    jax.config.update("jax_compilation_cache_dir", f"{_WORKDIR.value}/{COMPILED}")
  with guard_lib.Guard(run.limits) as guard:
    guard.stop.unsaved = False
    distributed.initialize()
    distributed.watch_peers(errors.EXIT_RESTART)
    distributed.say(distributed.describe(config.digest(run)))
    guard.ledger.part("join")
    try:
      train_run(run, _WORKDIR.value, options, guard)
      if not options.dry_run:
        small = run_flags.title().partition(" ")[0].endswith(":quickstart")
        metrics.show(next_command(run, _WORKDIR.value, "quickstart" if small else "m"))
    except (errors.CalmError, KeyboardInterrupt):
      raise
    except Exception:
      if distributed.count() == 1:
        raise
      traceback.print_exc()
      distributed.await_verdict()  # Another process's end shows here as any error of a collective.
      distributed.exit_now(1)  # Without the others, who would wait for this one.


if __name__ == "__main__":
  cli.run(main)
