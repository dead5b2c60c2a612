"""The plan of a token store: what the store is made from, and the folder of its unfinished parts.

A finished store keeps its plan in plan.json, so that `prepare` recognises a store of the same
input and settings and refuses any other. Parts of an unfinished store are in
unfinished/<hash of the plan>.
"""

from collections.abc import Callable, Mapping

from etils import epath

from calm_jax import errors, files, sealed_json
from calm_jax.data import manifest, store

_WORK = "unfinished"  # The folder of parts, below --output.


def finished_store(output: str, plan: Mapping[str, str]) -> store.TokenStore | None:
  """Returns the complete store at `output` if this plan made it, None if there is none.

  Raises:
    CalmError: if another plan made the store, or it is damaged.
  """
  loaded = manifest.read(output)
  if loaded is None:
    return None
  path = epath.Path(output) / store.PLAN
  stored = files.read_json(path)
  store.require_digest(path, loaded.plan)
  differing = [
    f"{name} ({stored.get(name, 'unknown')} there, {value} now)"
    for name, value in plan.items()
    if stored.get(name) != value
  ]
  if differing:
    raise errors.CalmError(
      f"{output} holds a token store that differs in {'; '.join(differing)}: give another "
      "--output, or remove that folder"
    )
  return store.TokenStore.open(output)


def has_work(output: str) -> bool:
  """Returns whether `output` holds parts of an unfinished store."""
  return (epath.Path(output) / _WORK).exists()


def work_folder(
  output: str, plan: Mapping[str, str], on_remove: Callable[[epath.Path], None]
) -> epath.Path:
  """Makes the folder for the parts of this plan and returns it.

  Folders of other plans are removed, each after a call of `on_remove`.
  """
  root = epath.Path(output) / _WORK
  work = root / sealed_json.digest(plan)[:16]
  work.mkdir(parents=True, exist_ok=True)
  for folder in root.iterdir():
    if folder.name != work.name:
      on_remove(folder)
      folder.rmtree()
  return work


def remove_work(output: str) -> None:
  """Removes the parts of an unfinished store.

  Raises:
    CalmError: if they can't be removed.
  """
  root = epath.Path(output) / _WORK
  try:
    if root.exists():
      root.rmtree()
  except OSError as error:
    raise errors.CalmError(f"can't remove {root}: {error}") from error
