"""A program of ours, looking only into $XDG_RUNTIME_DIR: python alone.py MODULE ARGUMENT...

What other tests start meanwhile, or this machine runs, with sockets in the system's folder, is none
of its business.
"""

import runpy
import sys

from socketprotector.system import control_path

control_path.SYSTEM = "/nonexistent"
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
