"""The one error that a person, not a program, is meant to read."""


class CalmError(ValueError):
  """Bad input: one line that says what was wrong, the value seen and what to do.

  Raised at the doors (flags, files, checkpoints). `cli.run` prints it without a
  traceback; any other exception is a bug and keeps its traceback.
  """
