"""socketprotectorctl, looking only into $XDG_RUNTIME_DIR.

What other tests start meanwhile, with sockets in the system's folder, is none of its business.
"""

import sys

from socketprotector.ctl.__main__ import main
from socketprotector.system import control_path

control_path.SYSTEM = "/nonexistent"
sys.exit(main())
