"""The system is out of descriptors or memory: try again later, and keep one descriptor in reserve.

An error of that kind (EMFILE, ENFILE, ENOBUFS, ENOMEM) is temporary.  A listener
stays readable meanwhile, so only a timer keeps the loop from spinning.

The reserve is for taking a connection out of a channel: the kernel gives it a number in this
process as it is received, and drops the connection where none is free (unix(7), MSG_CTRUNC).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from ....model.lazy_dataclass import KW_ONLY, field, mutable
from ....system.channel import Channel
from ....system.helper import BackOff
from ...runtime import Runtime

#: Waits, each twice as long as the one before while it lasts.
FIRST_WAIT_S = 0.01
LAST_WAIT_S = 0.5
_RETRY = "forwarder-retry"


@mutable
class Shortage:
    """Owns the reserve, and the timer after which there is another try."""

    runtime: Runtime
    _: KW_ONLY
    #: Accepts nothing.
    stop: Callable[[], None]
    #: Goes on, as far as can be.
    retry: Callable[[], None]
    #: Whether the timer runs.
    lasts: bool = False
    #: A descriptor of no other use, -1 while it is spent.
    reserve: int = -1
    _back_off: BackOff = field(default_factory=lambda: BackOff(FIRST_WAIT_S, LAST_WAIT_S))
    _since: float = 0.0

    def __post_init__(self) -> None:
        self.take_reserve()

    def begin(self, call: str, error: OSError) -> None:
        """Wait for descriptors or memory, longer each time in a row; say so the first time."""
        now = time.monotonic()
        if now - self._since > 2 * LAST_WAIT_S:
            self._back_off.reset()
            hint = "accepting again by a timer"
            self.runtime.log.write("error", "scarce", call=call, error=error.strerror, hint=hint)
        self._since = now
        self.lasts = True
        self.stop()
        self.runtime.loop.call_after(_RETRY, self._back_off.wait_s(), self._try_again)

    def _try_again(self) -> None:
        self.lasts = False
        self.retry()
        if not self.lasts:
            self.take_reserve()

    def take_reserve(self) -> bool:
        """Have the reserve; say whether it is there."""
        if self.reserve < 0:
            try:
                self.reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                self.begin("open", error)
        return self.reserve >= 0

    def spend_reserve(self) -> None:
        """Have its number free for another descriptor."""
        if self.reserve >= 0:
            os.close(self.reserve)
            self.reserve = -1

    def take_back(self, channel: Channel) -> tuple[bytes, int] | None:
        """Take one out of a channel; None where there is none, or no free descriptor.

        The reserve makes room: with none free the kernel would drop the connection silently.
        """
        if not self.take_reserve():
            return None
        self.spend_reserve()
        try:
            taken = channel.take_back()
        except OSError as error:
            self.begin("recvmsg", error)
            return None
        if taken is None:
            self.take_reserve()
        return taken

    def close(self) -> None:
        """Wait for nothing more."""
        self.runtime.loop.cancel(_RETRY)
        self.spend_reserve()
