"""The command `calm-jax ACT ...`, which runs an act as `python -m calm_jax.ACT ...` does.

Without an act it lists them.
"""

import ast
import pathlib
import runpy
import sys

# In the order of a project: from text to tokens, to a trained model, to what is known of it.
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
  """Returns what an act does, in a few words: its docstring's first line up to the command.

  Importing it would import JAX.
  """
  code = pathlib.Path(__file__).with_name(f"{act}.py").read_text(encoding="utf-8")
  line = (ast.get_docstring(ast.parse(code)) or "").partition("\n")[0]
  return line.partition(": `")[0].rstrip(".")


def listing() -> str:
  """Returns the acts, one a line."""
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
  """Runs the act that the command line names; its flags are the words after it."""
  word = sys.argv[1] if sys.argv[1:] else "--help"
  if word in ACTS:
    del sys.argv[1]
    # As __main__: then an act's own first lines, its signals and its processes are as with -m.
    runpy.run_module(f"calm_jax.{word}", run_name="__main__", alter_sys=True)
    return
  from calm_jax import cli, config, errors  # Acts come first: they import what they need.

  def tell() -> None:
    if word not in _HELP:
      raise errors.CalmError(f"no act {word!r}: {config.nearest(word, ACTS)}")
    print(listing())

  sys.exit(cli.exit_code(tell))


if __name__ == "__main__":
  main()
