"""Lives, and never says that it is ready."""

import _signal as signal

signal.pause()
