"""The same, in a program that gevent has patched before anything else."""

from gevent import monkey

monkey.patch_all()

import runpy  # noqa: E402
from pathlib import Path  # noqa: E402

runpy.run_path(str(Path(__file__).with_name("gevent_app.py")))
