"""Errors of Orbax, TensorStore and file systems -> a line, and whether they tell of damage."""

import errno
import re

# Where reading ends in one of these, a file may be whole: there is no damage to step back from.
UNREACHABLE = {
  errno.EACCES, errno.EAGAIN, errno.EBUSY, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
  errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET,
  errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENOTCONN,
}  # fmt: skip
_TOLD = re.compile(
  "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|"
  + "|".join(rf"\b{errno.errorcode[number]}\b" for number in sorted(UNREACHABLE))
)


def first_line(error: BaseException) -> str:
  """Returns an error's class and the first line of what it says."""
  lines = str(error).strip().splitlines()
  return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def is_unreachable(error: BaseException | None) -> bool:
  """Tells whether a file could not be read, rather than read and found wrong."""
  while error is not None:
    number = error.errno if isinstance(error, OSError) else None
    if number in UNREACHABLE or isinstance(error, MemoryError):
      return True
    if _TOLD.search(str(error)):  # By TensorStore, a bucket's client or a device.
      return True
    error = error.__cause__ or error.__context__
  return False
