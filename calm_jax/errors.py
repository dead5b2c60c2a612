"""Errors that users see and exit codes that schedulers read."""

EXIT_BAD_INPUT = 2
# What a shell reports for a process ended by Ctrl-C, and by SIGPIPE when its reader has ended.
EXIT_INTERRUPTED, EXIT_UNREAD = 130, 141
# EX_TEMPFAIL of sysexits.h: the same command, started again, resumes.
EXIT_RESTART = 75


class CalmError(ValueError):
  """Bad input: one line that says what was wrong, the value seen and what to do.

  Raised where input enters: flags, files, checkpoints. `cli.run` prints it without a traceback.
  Any other exception is a bug and keeps its traceback.
  """


class Interrupted(KeyboardInterrupt):
  """A signal stopped the run after its state was saved; the process exits with `code`."""

  def __init__(self, message: str, code: int):
    super().__init__(message)
    self.code = code
