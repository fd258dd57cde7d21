"""What ends a command besides its success, and the system's error numbers that a user can do something about."""

from __future__ import annotations

import errno

from config import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
BAD_DISK = tuple(getattr(errno, name) for name in (  # these may pass
    "EIO", "ESTALE", "EMFILE", "ENFILE", "EREMOTEIO", "ENODEV", "ENXIO", "ETIMEDOUT", "EBUSY", "EDEADLK", "ENOLCK")
    if hasattr(errno, name))
BAD_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EROFS, errno.EFBIG)


class TrainingError(UserError):
    """A run that must not go on."""
    exit_code = 1


class Ending(BaseException):
    """The end of a run that is no error in it, such as a signal: no `except Exception` may take it for one."""

    def __init__(self, words: str, exit_code: int):
        super().__init__(words)
        self.exit_code = exit_code
