"""How the prober calls a server in the Host header."""

from __future__ import annotations

from socketprotector.programs.prober import _shown_address
from tests.together import together


@together(
    ("address", "shown"),
    [
        (("127.0.0.1", 80), "127.0.0.1:80"),
        (("::1", 8080), "[::1]:8080"),
        (("fe80::1%eth0", 80), "[fe80::1]:80"),
        (("/run/s", 0), "localhost"),
    ],
)
def test_a_server_is_called_by_its_address(address: tuple[str, int], shown: str) -> None:
    assert _shown_address(*address) == shown
