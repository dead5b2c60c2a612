"""The command `calm-jax ACT ...`, which runs an act as `python -m calm_jax.ACT ...` does.

Without an act, it prints the list of acts.
"""

import ast
import pathlib
import runpy
import sys

# In the order of use: text to tokens, training, evaluation, export.
ACTS = (
  "prepare",
  "main",
  "evaluate",
  "generate",
  "report",
  "convert",
  "verify",
  "cost",
  "compile_ahead",
  "benchmark",
)
_HELP = ("--help", "-h", "help")


def summary(act: str) -> str:
  """Returns the first line of an act's docstring, without its command.

  The file is parsed, because importing it would import JAX.
  """
  code = pathlib.Path(__file__).with_name(f"{act}.py").read_text(encoding="utf-8")
  line = (ast.get_docstring(ast.parse(code)) or "").partition("\n")[0]
  return line.partition(": `")[0].rstrip(".")


def listing() -> str:
  """Returns the usage text, with one act per line."""
  width = max(map(len, ACTS))
  return "\n".join(
    [
      "usage: calm-jax ACT [--flag=value ...], the same as python -m calm_jax.ACT",
      "",
      *(f"  {act:{width}}  {summary(act)}" for act in ACTS),
      "",
      "calm-jax ACT --help lists the flags of an act.",
    ]
  )


def main() -> None:
  """Runs the act named by the first argument; the remaining arguments are its flags."""
  word = sys.argv[1] if sys.argv[1:] else "--help"
  if word in ACTS:
    del sys.argv[1]
    # As __main__, so that signal handlers and spawned processes work as with python -m.
    runpy.run_module(f"calm_jax.{word}", run_name="__main__", alter_sys=True)
    return
  from calm_jax import cli, config, errors  # Not imported before an act, for a fast start.

  def show_help() -> None:
    if word not in _HELP:
      raise errors.CalmError(f"no act {word!r}: {config.nearest(word, ACTS)}")
    print(listing())

  sys.exit(cli.exit_code(show_help))


if __name__ == "__main__":
  main()
