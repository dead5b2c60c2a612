"""The entry of every act: absl's app.run, with bad input as one line, and --help."""

import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from calm_jax import command_line, errors


def run(main: Callable[..., None], word: str = "") -> None:
  """Parses flags, runs `main` and exits.

  The exit code is 0 on success and after --help, 2 for bad input, 75 if the same command should
  be started again, 130 after Ctrl-C, and 141 if the reader of the output has ended.

  Args:
    main: the act.
    word: name of the positional argument of `main`, for errors; empty if it has none.
  """

  def guarded(argv: Sequence[str]) -> int:
    def act() -> None:
      words = argv[1:]
      if word and not words:
        raise errors.CalmError(f"{word} is missing: see --help")
      if len(words) > bool(word):
        raise errors.CalmError(
          f"unexpected argument {words[-1]!r}: give settings as --name=value; see --help"
        )
      main(*words)

    return exit_code(act)

  app.run(guarded, flags_parser=_parse)


def require_flag_files() -> None:
  """Exits with one line if a --flagfile can't be read.

  For acts with a config flag: its definition reads the command line, before `run` could report
  the error.
  """
  code = exit_code(lambda: command_line.require_flag_files(sys.argv))
  if code:
    sys.exit(code)


def exit_code(act: Callable[[], None]) -> int:
  """Runs an act and returns the exit code."""
  try:
    act()
    sys.stdout.flush()
  except errors.CalmError as error:
    print(f"error: {error}", file=sys.stderr)
    return errors.EXIT_BAD_INPUT
  except BrokenPipeError:  # The reader of the output has ended, as `head` does.
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
  """Parses flags and returns the other words; exits after --help and if a flag is wrong."""
  asked = command_line.asks_for_help(argv)
  if asked:
    sys.exit(exit_code(lambda: print(command_line.helped(argv, full=asked == "helpfull"))))
  try:
    rest = flags.FLAGS(argv)
  except Exception as error:  # A config file is code and may raise anything.
    print(f"error: {command_line.reason(argv, error)}", file=sys.stderr)
    sys.exit(errors.EXIT_BAD_INPUT)
  if flags.FLAGS["verbosity"].using_default_value:
    flags.FLAGS.verbosity = logging.FATAL  # --verbosity=0 shows the messages of libraries.
  return rest
