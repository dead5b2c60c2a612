"""Files that are there whole or not at all."""

from etils import epath

from calm_jax import errors


def write(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file, or leaves the one that was there.

  Raises:
    CalmError: if it can't be written.
  """
  target = epath.Path(path)
  temporary = target.parent / f"{target.name}.tmp"
  try:
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(target)
  except OSError as error:
    raise errors.CalmError(f"can't write {target}: {error}") from error
