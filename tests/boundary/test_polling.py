"""What a descriptor is ready for at this moment."""

from __future__ import annotations

import os
import resource
import select

import pytest

from socketprotector.system.polling import events_of


def test_nothing_is_known_while_not_a_single_descriptor_is_allowed() -> None:
    """poll(2) looks at none where the limit is 0, which may be lowered while we run."""
    receive, send = os.pipe()
    os.close(send)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert events_of(receive, select.POLLIN) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert events_of(receive, select.POLLIN) == select.POLLHUP
    os.close(receive)


def test_a_closed_socket_is_an_error_of_the_program() -> None:
    with pytest.raises(ValueError, match="negative"):
        events_of(-1, select.POLLIN)
