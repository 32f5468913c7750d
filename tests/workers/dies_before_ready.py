"""Says why on stderr and exits before it is ready."""

import sys

sys.exit("cannot read the configuration: no such luck")
