"""Text of programs, made safe to show."""

from __future__ import annotations

from socketprotector.model.text import last_line, output_line


def test_tabs_of_a_program_are_blanks_and_all_else_that_drives_a_terminal_is_escaped() -> None:
    assert output_line("a\tb\x1b[2J\r\\t") == r"a       b\x1b[2J\r\t"
    assert last_line(b"first\n\tmain.go:12\ton line 3\n") == "main.go:12      on line 3"
