"""Writes the history of releases, and waits until it and `current` are on disk.

Waiting for a disk would keep clients of the resident process waiting, so this is a process of its
own.  It may outlive a killed protector.  So it creates no file: the protector has created the
temporary file, and the next owner of `current` removes that file.  Then this rename fails.

Its words: the descriptors of the folder, the new contents and the temporary file, the name of the
temporary file, and that of the history's file.  It prints "ok", or why it failed.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def main(folder: int, content: int, file: int, following: str, name: str) -> None:
    """Replace the history by rename(2), and sync the folder, which also has the link `current`."""
    left = os.pread(content, os.fstat(content).st_size, 0)
    try:
        while left:
            left = left[os.write(file, left) :]
        os.fsync(file)
        os.rename(following, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        with suppress(OSError):  # the next owner may have removed it
            os.unlink(following, dir_fd=folder)
        raise
    os.fsync(folder)


if __name__ == "__main__":
    try:
        folder_fd, content_fd, file_fd = map(int, sys.argv[1:4])
        main(folder_fd, content_fd, file_fd, *sys.argv[4:])
        print("ok")
    except OSError as error:
        print(f"{sys.argv[5]}: {error.strerror}")
