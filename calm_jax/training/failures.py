"""Errors of Orbax, TensorStore and file systems -> one line, and whether they mean damage."""

import errno
import re

# A file that can't be read because of one of these may be intact, so no older one is used.
UNREACHABLE = {
  errno.EACCES,
  errno.EAGAIN,
  errno.EBUSY,
  errno.ECONNREFUSED,
  errno.ECONNRESET,
  errno.EHOSTUNREACH,
  errno.EIO,
  errno.EMFILE,
  errno.ENETUNREACH,
  errno.ENFILE,
  errno.ENOMEM,
  errno.ENOTCONN,
  errno.EPERM,
  errno.ESTALE,
  errno.ETIMEDOUT,
}
# The same in messages of TensorStore, a bucket's client or a device.
_UNREACHABLE_TEXT = re.compile(
  "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|"
  + "|".join(rf"\b{errno.errorcode[number]}\b" for number in sorted(UNREACHABLE))
)


def first_line(error: BaseException) -> str:
  """Returns an error's class and the first line of its message."""
  lines = str(error).strip().splitlines()
  return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def is_unreachable(error: BaseException | None) -> bool:
  """Returns whether a file could not be read at all, so that it may be intact."""
  while error is not None:
    number = error.errno if isinstance(error, OSError) else None
    if number in UNREACHABLE or isinstance(error, MemoryError):
      return True
    if _UNREACHABLE_TEXT.search(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False
