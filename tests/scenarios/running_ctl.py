"""A socketprotectorctl that runs beside the test."""

from __future__ import annotations

import os

from tests import forked
from tests.running import DEADLINE_S, Lines
from tests.unit.ctl.conftest import COMMAND


class Running:
    """A ctl that runs beside the test."""

    def __init__(self, *arguments: str) -> None:
        out, out_send = os.pipe()
        err, err_send = os.pipe()
        self.process = forked.popen([*COMMAND, *arguments], stdout=out_send, stderr=err_send)
        os.close(out_send)
        os.close(err_send)
        self.out, self.err = Lines(out), Lines(err)

    def end(self) -> None:
        """Whatever the test left."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.out.join()
        self.err.join()

    def wait(self) -> int:
        status = self.process.wait(DEADLINE_S)
        self.out.join()
        self.err.join()
        return status
