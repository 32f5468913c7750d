"""Says that it is ready and dies at once; with a FIFO's path, once that has been opened."""

import os
import sys

from plain import say

say(b"READY=1")
if len(sys.argv) > 1:
    os.open(sys.argv[1], os.O_RDONLY)
sys.exit(1)
