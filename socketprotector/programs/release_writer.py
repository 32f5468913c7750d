"""Writes the history of releases, and waits until it and `current` are on disk.

Waiting for a disk would keep clients of the resident process waiting, so this is a process of its
own.  It may outlive a killed protector, and write at the same time as the next one's writer.  So
each writer has a temporary file of its own, and removes those of all others: what another writer
would still rename is older.

Its words: the descriptor of the folder, that of the new contents, the name of the history's file.
It prints "ok", or why it failed.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def main(folder: int, content: int, name: str) -> None:
    """Replace the history by rename(2), and sync the folder, which also has the link `current`."""
    before = f"{name}.next."  # no name of an operator's copy, such as current.history.20261125
    following = f"{before}{os.getpid()}"
    left = os.pread(content, os.fstat(content).st_size, 0)
    for each in os.listdir(folder):
        if each.startswith(before):
            with suppress(OSError):  # it is gone, or no file that a writer has made
                os.unlink(each, dir_fd=folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(following, flags, 0o644, dir_fd=folder)
    while left:
        left = left[os.write(fd, left) :]
    os.fsync(fd)
    os.close(fd)
    os.rename(following, name, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
        print("ok")
    except OSError as error:
        print(f"{sys.argv[3]}: {error.strerror}")
