"""The errors and exit codes that a person or a scheduler, not a program, is meant to read."""

EXIT_BAD_INPUT = 2
# What a shell reports for a process ended by Ctrl-C, and by a reader that left.
EXIT_INTERRUPTED, EXIT_UNREAD = 130, 141
# sysexits.h: try again. The same command, started again, goes on.
EXIT_RESTART = 75


class CalmError(ValueError):
  """Bad input: one line that says what was wrong, the value seen and what to do.

  Raised at the doors (flags, files, checkpoints). `cli.run` prints it without a
  traceback; any other exception is a bug and keeps its traceback.
  """


class Interrupted(KeyboardInterrupt):
  """Stopped by a signal after the state was saved; `code` is what the process exits with."""

  def __init__(self, message: str, code: int):
    super().__init__(message)
    self.code = code
