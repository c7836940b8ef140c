"""Two names that change places in one step."""

import ctypes
import errno
import os
from pathlib import Path

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE of linux/fs.h, AT_FDCWD of fcntl.h
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV)


def exchange(one: Path, other: Path) -> bool:
    """Lets two files or folders change places; False where the system or the file system cannot, and nothing was done.

    Raises:
      OSError: another reason.
    """
    number = _renameat2(os.fsencode(one), os.fsencode(other))
    if number in _CANNOT:
        return False
    if number:
        raise OSError(number, os.strerror(number), str(other))
    return True


def _renameat2(one: bytes, other: bytes) -> int:
    """The number of the error, 0 for none."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2  # Linux 3.15, glibc 2.28
    except (AttributeError, OSError, TypeError):
        return errno.ENOSYS
    return ctypes.get_errno() if call(_HERE, one, _HERE, other, _EXCHANGE) else 0
