"""The door of every act: absl's app.run, with bad input told in one line."""

import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from calm_jax import errors


def run(main: Callable[[], None]) -> None:
  """Parses flags, runs `main` and exits.

  The code is 0, 2 for bad input, 75 where the same command is to be started again, 130
  after Ctrl-C, 141 unread.
  """

  def guarded(argv: Sequence[str]) -> int:
    try:
      if len(argv) > 1:
        raise errors.CalmError(
          f"unexpected argument {argv[1]!r}: settings are given as --name=value; see --help"
        )
      main()
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

  def parse(argv: Sequence[str]) -> Sequence[str]:
    try:
      rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
      # ml_collections reports a wrong --config.name with any of these, and what a config
      # file raises as the text of its traceback.
      reason = " ".join(str(error).split()).rpartition("CalmError: ")[2]
      print(f"error: {reason}", file=sys.stderr)
      sys.exit(errors.EXIT_BAD_INPUT)
    if flags.FLAGS["verbosity"].using_default_value:
      flags.FLAGS.verbosity = logging.FATAL  # --verbosity=0 shows what the libraries tell.
    return rest

  app.run(guarded, flags_parser=parse)
