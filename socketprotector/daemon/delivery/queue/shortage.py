"""Handles a shortage of descriptors or memory: retries later, and keeps one descriptor in reserve.

A shortage (EMFILE, ENFILE, ENOBUFS, ENOMEM) is temporary.  But listeners stay readable, and would
keep the loop spinning.  So we stop watching the listeners, and a timer calls retry().

The reserve is an open descriptor, which we close just before we take a connection out of a channel.
So a descriptor number is free for the connection; otherwise the kernel would drop the connection
(unix(7), MSG_CTRUNC).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from ....model.lazy_dataclass import KW_ONLY, field, mutable
from ....system.channel import Channel
from ....system.helper import BackOff
from ...runtime import Runtime

#: The first and the longest wait before a retry; the wait doubles after each failure.
FIRST_WAIT_S = 0.01
LAST_WAIT_S = 0.5
_RETRY = "forwarder-retry"


@mutable
class Shortage:
    """The reserve, and the timer of the next retry."""

    runtime: Runtime
    _: KW_ONLY
    #: Stops accepting.
    stop: Callable[[], None]
    #: Sends and accepts again, as far as possible.
    retry: Callable[[], None]
    #: True while the shortage lasts and the timer runs.
    lasts: bool = False
    #: The reserve descriptor; -1 while it is spent.
    reserve: int = -1
    _back_off: BackOff = field(default_factory=lambda: BackOff(FIRST_WAIT_S, LAST_WAIT_S))
    _paused_at: float = 0.0
    _failed_at: float = 0.0

    def __post_init__(self) -> None:
        self.open_reserve()

    def begin(self, call: str, error: OSError) -> None:
        """Log the first failure of a shortage, and call pause()."""
        now = time.monotonic()
        if now - self._failed_at > 2 * LAST_WAIT_S:
            hint = "SocketProtector tries again after a short pause"
            self.runtime.log.write(
                "error", "resources-exhausted", call=call, error=error.strerror, hint=hint
            )
        self._failed_at = now
        self.pause()

    def pause(self) -> None:
        """Stop accepting, and retry after a growing wait."""
        now = time.monotonic()
        if now - self._paused_at > 2 * LAST_WAIT_S:
            self._back_off.reset()
        self._paused_at = now
        self.lasts = True
        self.stop()
        self.runtime.loop.call_after(_RETRY, self._back_off.wait_s(), self._try_again)

    def _try_again(self) -> None:
        self.lasts = False
        self.retry()
        if not self.lasts:
            self.open_reserve()

    def open_reserve(self) -> bool:
        """Open the reserve if it is spent; return whether it is open."""
        if self.reserve < 0:
            try:
                self.reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                self.begin("open", error)
        return self.reserve >= 0

    def spend_reserve(self) -> None:
        """Close the reserve, to free its number for another descriptor."""
        if self.reserve >= 0:
            os.close(self.reserve)
            self.reserve = -1

    def take_back(self, channel: Channel) -> tuple[bytes, int] | None:
        """Take a connection out of a channel; return its header and descriptor.

        None: the channel is empty, or a shortage begins.  The descriptor is -1 if the kernel has
        dropped the connection.  A taken connection uses up the reserve.  Outlet.let_go() closes
        our copy of the connection, and opens the reserve again.
        """
        if not self.open_reserve():
            return None
        self.spend_reserve()
        try:
            taken = channel.take_back()
        except OSError as error:
            self.begin("recvmsg", error)
            return None
        if taken is None:
            self.open_reserve()
        return taken

    def close(self) -> None:
        self.runtime.loop.cancel(_RETRY)
        self.spend_reserve()
