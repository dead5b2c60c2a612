"""Provenance of a report: versions of the libraries and the commit of this package."""

import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess

import calm_jax

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")


def versions() -> dict[str, str | None]:
  """Returns the version of Python, each library (None if it is not installed) and calm_jax."""
  result: dict[str, str | None] = {"python": platform.python_version()}
  for name in LIBRARIES:
    try:
      result[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      result[name] = None
  return result | {"calm_jax": calm_jax.__version__}


def processor() -> str:
  """Returns the number of cores, and their model if Linux reports it."""
  cores, info = f"{os.cpu_count()} cores", pathlib.Path("/proc/cpuinfo")
  models = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else []
  return f"{cores} of {models[0]}" if models else cores


def commit() -> str | None:
  """Returns the short commit of the checkout that holds calm_jax, with "-dirty" if it has changes.

  Changes in benchmarks/ do not count, so that several benchmarks can record the same commit.
  None if there is no git, or the package is not tracked by the checkout around it, such as one
  in a virtual environment inside another project.
  """
  package = pathlib.Path(calm_jax.__file__)
  root = str(package.parent.parent)
  tracked = _git(root, "ls-files", "--error-unmatch", f"{package.parent.name}/{package.name}")
  revision = _git(root, "rev-parse", "--short", "HEAD")
  if not tracked or not revision:
    return None
  changes = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks")
  return f"{revision}-dirty" if changes else revision


def _git(directory: str, *arguments: str) -> str:
  """Returns git's output, "" if git fails or is not installed."""
  command = ["git", "--no-optional-locks", "-C", directory, *arguments]
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
  except OSError:
    return ""
  return done.stdout.strip() if done.returncode == 0 else ""
