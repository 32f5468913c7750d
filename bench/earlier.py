"""Has a protector started by the code of an earlier commit, and puts this code in its place.

The packages are replaced below the running processes, as by `pip install --upgrade`: the paths
stay.  So what old processes execute from then on is new code: the protector itself, the relay, the
watcher, the adapters, the reader of a configuration.  What they have in memory stays old.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from socketprotector import __version__

ROOT = Path(__file__).resolve().parent.parent


class NoSuchCommit(Exception):
    """Its files cannot be had here; the message says why, and what to do."""


def resolve(commit: str) -> str:
    """Return a commit's full hash.  Raises NoSuchCommit."""
    return _git(commit, "rev-parse", "--verify", f"{commit}^{{commit}}").decode().strip()


def release_before() -> str:
    """Return the last release before this code, as a tag or a commit.  Raises NoSuchCommit.

    Without a tag, it is the parent of the commit that set this code's version.  A pre-release's
    tag, such as v0.9.0rc1, does not count.
    """
    listed = _git("HEAD", "tag", "--list", "v*", "--merged", "HEAD^", "--sort=-version:refname")
    tags = [tag for tag in listed.decode().split() if re.fullmatch(r"v\d+\.\d+\.\d+", tag)]
    if tags:
        return tags[0]
    version = f'version = "{__version__}"'
    found = _git("HEAD", "log", "--format=%H", f"-S{version}", "--", "pyproject.toml").split()
    if not found:
        raise NoSuchCommit(f"no commit has given this code the version {__version__}")
    return f"{found[-1].decode()}^"


def extract(commit: str, folder: Path) -> None:
    """Write a commit's two packages into a folder; the hash is the version that they say.

    Raises NoSuchCommit.
    """
    commit = resolve(commit)
    packed = _git(commit, "archive", commit, "socketprotector", "client_lib/socketprotector_client")
    subprocess.run(["tar", "-xC", folder], input=packed, check=True)
    about = folder / "socketprotector" / "__init__.py"
    text, count = re.subn(
        r'(?m)^__version__ = ".*"$', f'__version__ = "{commit[:12]}"', about.read_text()
    )
    assert count == 1, f"no version in {about}"
    about.write_text(text)


class EarlierCode:
    """Where a protector finds its code: an earlier commit's, after replace() this checkout's."""

    def __init__(self, folder: Path, extracted: Path) -> None:
        """folder: for a link.  extracted: by extract()."""
        self._link = folder / "installed"
        self._new = folder / "installed.new"
        self._earlier = extracted
        self.put_back()

    @property
    def client_library(self) -> Path:
        """What workers have on their PYTHONPATH to get the client library of the same code."""
        return self._link / "client_lib"

    @property
    def environment(self) -> dict[str, str]:
        """What command() needs."""
        return {"PYTHONPATH": f"{self._link}:{self.client_library}"}

    @property
    def command(self) -> tuple[str, ...]:
        """What starts the protector, now and at an upgrade."""
        return (sys.executable, "-P", "-m", "socketprotector")

    def replace(self) -> None:
        """Put this checkout's code in the place of the earlier one, at once."""
        self._lead_to(ROOT)

    def put_back(self) -> None:
        """Put the earlier code in its place again, at once."""
        self._lead_to(self._earlier)

    def _lead_to(self, code: Path) -> None:
        self._new.symlink_to(code)
        self._new.rename(self._link)


def _git(commit: str, *words: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, check=False)
    except FileNotFoundError as error:
        raise NoSuchCommit(f"git is not installed, which has the code of {commit}") from error
    if done.returncode:
        why = done.stderr.decode("utf-8", "replace").strip()
        raise NoSuchCommit(
            f"git does not have the code of {commit} here ({why}); in a shallow clone: "
            "git fetch --unshallow"
        )
    return done.stdout
