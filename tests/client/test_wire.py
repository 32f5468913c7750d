"""The worker protocol, version 1 (docs/protocol.md): values that later versions must not change.

A worker that was built for version 1 has these values in its own code, so a test that takes both
sides from wire.py would not notice a change.  RECORD_CHARGE_BYTES and SMALLEST_QUEUE are measured:
they may change with the kernel.
"""

from __future__ import annotations

from socketprotector_client import wire

VALUES = {
    "VERSION": 1,
    "KIND_CONNECTION": 1,
    "KIND_RETURNED": 2,
    "STATE_MAX_BYTES": 4096,
    "RECORD_CHARGE_BYTES": 768,
    "SMALLEST_QUEUE": 6,
    "ENV_CHANNEL": "SOCKETPROTECTOR_CHANNEL",
    "ENV_RETURN": "SOCKETPROTECTOR_RETURN",
    "ENV_LISTENERS": "SOCKETPROTECTOR_LISTENERS",
    "ENV_GENERATION": "SOCKETPROTECTOR_GENERATION",
    "ENV_WORKER": "SOCKETPROTECTOR_WORKER",
    "ENV_WORKERS": "SOCKETPROTECTOR_WORKERS",
    "ENV_SCOREBOARD": "SOCKETPROTECTOR_SCOREBOARD",
    "ENV_DRAIN_SPREAD": "SOCKETPROTECTOR_DRAIN_SPREAD",
    "ENV_STOP_SPREAD": "SOCKETPROTECTOR_STOP_SPREAD",
    "ENV_CHILD": "SOCKETPROTECTOR_CHILD",
    "ENV_LOG_PREFIX": "SOCKETPROTECTOR_LOG_PREFIX",
    "ENV_NOTIFY": "NOTIFY_SOCKET",
    "BOARD_WORDS": 1024,
    "BOARD_BYTES": 8192,
    "BOARD_UNKNOWN": 0,
    "BOARD_COUNTED": 1,
    "BOARD_STATE": 0,
    "BOARD_ACCEPTED": 1,
    "BOARD_ACTIVE": 2,
    "BOARD_ERRORS": 3,
    "BOARD_SPREADS": 4,
    "BOARD_SPREAD_UNTIL": 5,
    "SPREAD_NEVER": 18446744073709551615,
    "BOARD_CHILDREN_FROM": 6,
    "BOARD_CHILDREN": 7,
    "BOARD_PID": 8,
    "BOARD_WORKER_SLOTS": 1024,
    "BOARD_CHILD_SLOTS": 1024,
    "BOARD_WAITS": 16,
    "BOARD_WAIT_WORDS": 32,
    "BOARD_ACCEPTED_AT": 64,
    "BOARD_DESCRIPTORS": 960,
    "RETIRES_ON_RETURN": "X_SOCKETPROTECTOR_RETIRE=1",
    "PROGRAM": "X_SOCKETPROTECTOR_PROGRAM",
    "CHILD": "X_SOCKETPROTECTOR_CHILD",
    "REMOVED_LISTENER": "-",
}
PLAIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/:@[].-_~"


def test_the_values_of_version_1_stay() -> None:
    found = {name: value for name, value in vars(wire).items() if name.isupper() and name[0] != "_"}

    assert found.pop("HEADER").format == "<BBHIQ"
    assert found == VALUES


def test_a_record_begins_with_a_header_of_16_bytes() -> None:
    assert wire.HEADER.pack(1, 2, 3, 4, 5).hex() == "01020300" + "04000000" + "05" + "00" * 7


def test_a_byte_of_an_address_is_plain_or_percent_and_two_digits() -> None:
    for code in range(256):
        address = f"unix:/{bytes([code]).decode('utf-8', 'surrogateescape')}"

        packed = wire.pack_listeners([address])

        byte = chr(code) if chr(code) in PLAIN else f"%{code:02X}"
        assert packed == f"unix:/{byte}"
        assert wire.unpack_listeners(packed) == [address]


def test_addresses_are_unpacked_and_a_false_percent_stays() -> None:
    for value, addresses in (
        ("", []),
        ("tcp:[::1]:80 - unix:/a%20b", ["tcp:[::1]:80", "-", "unix:/a b"]),
        ("unix:%2Fa%41%41b", ["unix:/aAAb"]),
        ("unix:/%c3%bc", ["unix:/ü"]),
        ("unix:/100%", ["unix:/100%"]),
        ("unix:/%4", ["unix:/%4"]),
        ("unix:/%zz%41", ["unix:/%zzA"]),
        ("unix:/%%41", ["unix:/%A"]),
    ):
        assert wire.unpack_listeners(value) == addresses


def test_addresses_are_packed_in_order() -> None:
    assert wire.pack_listeners(["tcp:a:1", "unix:/b c", "-"]) == "tcp:a:1 unix:/b%20c -"
