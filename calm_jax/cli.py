"""The door of every act: absl's app.run, with bad input told in one line, and --help."""

import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from calm_jax import command_line, errors


def run(main: Callable[..., None], word: str = "") -> None:
  """Parses flags, runs `main` and exits.

  Args:
    word: names the one argument that `main` takes, which is given as it is; empty for none.

  The code is 0, also after --help, 2 for bad input, 75 where the same command is to be
  started again, 130 after Ctrl-C, 141 unread.
  """

  def guarded(argv: Sequence[str]) -> int:
    def act() -> None:
      words = argv[1:]
      if word and not words:
        raise errors.CalmError(f"{word} is missing: see --help")
      if len(words) > bool(word):
        raise errors.CalmError(
          f"unexpected argument {words[-1]!r}: settings are given as --name=value; see --help"
        )
      main(*words)

    return _ended(act)

  app.run(guarded, flags_parser=_parse)


def _ended(act: Callable[[], None]) -> int:
  """Runs an act; returns the code to exit with."""
  try:
    act()
    sys.stdout.flush()
  except errors.CalmError as error:
    print(f"error: {error}", file=sys.stderr)
    return errors.EXIT_BAD_INPUT
  except BrokenPipeError:  # Whoever read the output has enough, as `head` does.
    for stream in (sys.stdout, sys.stderr):
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return errors.EXIT_UNREAD
  except errors.Interrupted as stopped:
    return stopped.code
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return errors.EXIT_INTERRUPTED
  return 0


def _parse(argv: Sequence[str]) -> Sequence[str]:
  """Returns the words that are no flags; exits after --help, and where a flag is wrong."""
  asked = command_line.asks_for_help(argv)
  if asked:
    sys.exit(_ended(lambda: print(command_line.helped(argv, whole=asked == "helpfull"))))
  try:
    rest = flags.FLAGS(argv)
  except Exception as error:  # A config file is code, which may raise anything.
    print(f"error: {command_line.reason(argv, error)}", file=sys.stderr)
    sys.exit(errors.EXIT_BAD_INPUT)
  if flags.FLAGS["verbosity"].using_default_value:
    flags.FLAGS.verbosity = logging.FATAL  # --verbosity=0 shows what the libraries tell.
  return rest
