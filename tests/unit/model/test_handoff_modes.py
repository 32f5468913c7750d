"""What follows from a handoff mode."""

from __future__ import annotations

import pytest

from socketprotector.model.handoff_modes import (
    CONNECTION,
    LEGACY,
    LISTENER,
    MODES,
    STDIO,
    HandoffMode,
)
from socketprotector.model.settings import Settings, SettingsError, dump, load
from tests.together import together


def test_a_mode_is_found_by_the_name_that_settings_have() -> None:
    assert list(MODES) == ["connection", "listener", "stdio", "legacy"]
    assert Settings("x", ("server",), "/").mode is CONNECTION
    assert load(dump(Settings("x", ("server",), "/", handoff="stdio"))).mode is STDIO


def test_settings_with_a_mode_of_a_newer_program_are_refused() -> None:
    newer = dump(Settings("x", ("server",), "/")).replace(b'"connection"', b'"datagram"')
    with pytest.raises(SettingsError, match="datagram"):
        load(newer)


def test_a_command_needs_the_library_where_it_takes_from_the_queue_itself() -> None:
    assert [each for each in MODES.values() if each.needs_library] == [CONNECTION]


@together(
    ("mode", "option"),
    [
        (CONNECTION, "drain-signal"),
        (CONNECTION, "shell"),
        (LISTENER, "shell"),
        (LISTENER, "lame-duck-idle"),
        (STDIO, "drain-signal"),
        (LEGACY, "ready"),
    ],
)
def test_an_option_that_a_mode_has_no_use_for_is_refused(mode: HandoffMode, option: str) -> None:
    refused = mode.refused(["workers", option])
    assert refused is not None
    assert refused.startswith(f"--{option} with --handoff {mode.name}: ")


def test_other_options_are_not() -> None:
    assert CONNECTION.refused(["workers", "queue"]) is None
    assert LISTENER.refused(["drain-signal", "ready"]) is None
    assert STDIO.refused(["shell"]) is None
