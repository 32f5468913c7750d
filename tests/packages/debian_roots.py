"""Systems of Debian for these tests, made by debootstrap; DEBIAN_ROOTS=FOLDER keeps them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

#: What the packages depend on and what makes an image's virtual environment.
NEEDS = "python3,python3-click,python3-daemon,python3-lockfile,python3-psutil,python3-rich"
NEEDS = f"{NEEDS},python3-prometheus-client,python3-venv"


def debian_roots() -> Iterator[Callable[..., Path]]:
    """Yield what returns the root of a suite; nothing may be written into it.  For a fixture.

    Of packages that are named, too, it makes one that has them; clean: one that has none but those
    that each Debian has.
    """
    kept = os.environ.get("DEBIAN_ROOTS")
    with tempfile.TemporaryDirectory(prefix="debian-") as folder:
        roots = Path(kept).absolute() if kept else Path(folder)

        def root_of(suite: str, *more: str, clean: bool = False) -> Path:
            name = "+".join((f"{suite}-clean" if clean else suite, *more))
            root, begun = roots / name, roots / f"{name}.begun"
            if not root.exists():
                shutil.rmtree(begun, ignore_errors=True)
                begun.parent.mkdir(parents=True, exist_ok=True)
                packages = ",".join(more if clean else (NEEDS, *more))
                include = [f"--include={packages}"] if packages else []
                words = ("--variant=minbase", *include, suite, str(begun))
                subprocess.run(["debootstrap", *words], check=True, stdout=subprocess.DEVNULL)
                begun.rename(root)
            return root

        yield root_of
