"""Finds the mounted folders of this process's cgroups, of both versions.

Source: cgroups(7); proc(5) for mountinfo.
"""

from __future__ import annotations

PROC = "/proc/self"


def names(proc: str = PROC) -> str:
    """Return the names of our cgroups; they change if the process moves.  Raises OSError."""
    return read(f"{proc}/cgroup")


def folders(controller: str, proc: str = PROC) -> list[tuple[int, str]]:
    """Return our cgroup of a controller, then its ancestors, each as (version, folder).

    If both versions are mounted, both are returned, although only one has the controller's files.
    Raises OSError.
    """
    named = (line.split(":", 2) for line in names(proc).splitlines())
    paths = {tuple(words[1].split(",")): words[2] for words in named}
    found: list[tuple[int, str]] = []
    for line in read(f"{proc}/mountinfo").splitlines():
        words = line.split()
        kind, options = words[words.index("-") + 1], words[-1].split(",")
        if kind == "cgroup2" and ("",) in paths:
            version, ours = 2, [paths[("",)]]
        elif kind == "cgroup" and controller in options:
            version, ours = 1, [path for names, path in paths.items() if controller in names]
        else:
            continue
        found += [(version, folder) for path in ours for folder in _up(path, words[3], words[4])]
    return found


def _up(path: str, root: str, mount: str) -> list[str]:
    """Return the folders of a cgroup and of its ancestors, as far as they are mounted.

    In a container the mount may begin at the container's cgroup, despite the path in /proc.
    """
    inside = path.removeprefix(root) if root != "/" else path
    parts = inside.strip("/").split("/")
    return ["/".join((mount, *parts[:count])).rstrip("/") for count in range(len(parts), -1, -1)]


def read(path: str) -> str:
    """Return a file's text.  Raises OSError."""
    with open(path, "rb") as file:
        return file.read().decode("utf-8", "replace")
