"""Giving a finished file its name, never in the place of another file."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def publish(temporary: Path, path: Path) -> None:
    """Renames a finished file, for which two who save at once never both succeed.

    On a file system without hard links there is a moment between looking for a file and taking its place.

    Args:
      temporary: a file in the folder of `path`; it keeps its name if this fails.
      path: the name that it gets.

    Raises:
      FileExistsError: there is something of that name, which is left as it is; a link that leads nowhere is something.
      OSError: the folder cannot be written.
    """
    try:
        os.link(temporary, path)  # unlike a renaming, never replaces a file
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, on which hours of work must not be lost
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.rename(path)
    else:
        temporary.unlink()
