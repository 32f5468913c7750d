"""Lives, and never says that it is ready."""

import signal

signal.pause()
