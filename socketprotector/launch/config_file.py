"""The configuration file: TOML in, values of options out, and every mistake with its place.

A key is an option's name without the dashes before it (`start-timeout = "10s"`), besides
`listen` and `command`.  Each value goes through the option's own converter, so whatever the
command line refuses is refused here in the same words.

Mistakes are collected, not raised, until all of the file has been looked at.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import click

from ..model.errors import UsageError
from ..system import env_file
from . import toml_lines

#: Options that have no key, and what to do instead.
NOT_HERE = {
    "check": "for the command line only",
    "config": "for the command line only",
    "help": "for the command line only",
    "require-user": "for the command line only",
    "verbose": 'write log-level = "debug"',
    "version": "for the command line only",
    "watch": "for the command line only",
}
#: `--chdir /x: ...`, `--limit nofile=x: ...`: how a refusal names what it is about.
_OPTION = re.compile(r"--([a-z-]+)(?: (?=[^ ]*: |[^ ]+=)|: )")
_NUL = "a NUL cannot be in it"
LISTEN, COMMAND = "listen", "command"
_PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)\Z")


class Mistaken(UsageError):
    """What is wrong with a file: one line for each mistake."""


class ConfigFile:
    """A file that was read, and what is wrong with it so far."""

    def __init__(self, path: str) -> None:
        """Read a file.  Raises Mistaken where it is no TOML at all, UsageError if it cannot be."""
        self.path = path
        #: Relative paths in it are meant from here, as the name says it: a symlink is followed
        #: at each reload.
        self.folder = os.path.dirname(path)
        self.listens: tuple[str, ...] = ()
        self.command: tuple[str, ...] = ()
        #: Of options, by the parameter's name, as words of a command line.
        self.values: dict[str, Any] = {}
        #: Of options that are given again and again: name -> value, converted.
        self.tables: dict[str, dict[str, str]] = {}
        self._mistakes: list[tuple[int, str]] = []
        self._read, self._places = self._parse()

    def _parse(self) -> tuple[dict[str, Any], dict[toml_lines.Path, int]]:
        try:
            data = env_file.contents(self.path)
        except OSError as error:
            raise UsageError(f"--config {self.path}: {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"--config {error}") from error
        try:
            text = data.decode()
            return tomllib.loads(text), toml_lines.find(text)
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise Mistaken(self._line(line, "not UTF-8, which TOML is")) from error
        except tomllib.TOMLDecodeError as error:
            found = _PLACE.search(str(error))
            at_end = data.rstrip().count(b"\n") + 1
            line = int(found[1]) if found and found[1] else at_end
            reason = str(error).removesuffix(found[0] if found else "")
            raise Mistaken(self._line(line, f"not TOML: {reason}")) from error
        except RecursionError as error:
            raise Mistaken(self._line(1, "nested too deeply")) from error

    # -- mistakes --------------------------------------------------------------

    def mistake(self, where: toml_lines.Path, reason: str) -> None:
        """Note what is wrong with a key, or with a value in a list."""
        names = ".".join(each for each in where if isinstance(each, str))
        self._mistakes.append((self._places.get(where, 1), f"{names}: {reason}"))

    @contextmanager
    def about(self, *where: str | int) -> Iterator[None]:
        """Take a UsageError for a mistake of this key."""
        try:
            yield
        except UsageError as error:
            # It may name the option, which may be another one of the same look.
            told = _OPTION.match(str(error))
            key = told[1] if told and (told[1],) in self._places else str(where[0])
            where = where if key == where[0] else (key,)
            self.mistake(where, str(error)[told.end() if told and told[1] == key else 0 :])

    def refuse_if_mistaken(self) -> None:
        """Raise Mistaken if anything was noted."""
        if self._mistakes:
            told = dict.fromkeys(self._line(*each) for each in sorted(self._mistakes))
            raise Mistaken("\n".join(told))

    def _line(self, number: int, reason: str) -> str:
        return f"{self.path} line {number}: {reason}"

    # -- values ----------------------------------------------------------------

    def convert(self, ctx: click.Context) -> None:
        """Look at every key; what is right goes to `values`, `tables` and `command`."""
        known = keys(ctx.command.params)
        for key, value in self._read.items():
            if key == LISTEN:
                self._listen(value)
            elif key == COMMAND:
                if self._are_strings(key, value, 'a list of words, like ["./daemon", "4321"]'):
                    self.command = tuple(value)
            elif key in known:
                self._option(ctx, key, known[key], value)
            elif key in NOT_HERE:
                self.mistake((key,), f"has no place in a file; {NOT_HERE[key]}")
            else:
                near = get_close_matches(key, [*known, LISTEN, COMMAND], 1)
                what = f"did you mean {near[0]}?" if near else "docs/config.md lists them"
                self.mistake((key,), f"unknown key; {what}")

    def _listen(self, value: Any) -> None:
        words = [value] if isinstance(value, str) else value
        if self._are_strings(LISTEN, words, 'a string or a list of them, like ["4321"]'):
            for index, word in enumerate(words):
                if word in words[:index]:
                    self.mistake((LISTEN, index), f"{word}: listed twice")
            self.listens = tuple(words)

    def _are_strings(self, key: str, value: Any, wanted: str) -> bool:
        if not isinstance(value, list) or not value:
            self.mistake((key,), f"must be {wanted}")
            return False
        wrong = 0
        for index, each in enumerate(value):
            if not isinstance(each, str) or not each:
                self.mistake((key, index), f"{_shown(each)}: must be a string")
                wrong += 1
            elif "\0" in each:
                self.mistake((key, index), _NUL)
                wrong += 1
        return not wrong

    def _option(self, ctx: click.Context, key: str, option: click.Option, value: Any) -> None:
        if option.multiple:
            self._table(ctx, key, option, value)
            return
        wanted = _wrong_kind(option, value)
        if isinstance(value, str) and "\0" in value:
            self.mistake((key,), _NUL)
            return
        if wanted:
            self.mistake((key,), f"{_shown(value)}: must be {wanted}")
            return
        given = value if isinstance(value, bool) else str(value)
        if self._converts(ctx, option, given, (key,)):
            self.values[str(option.name)] = given

    def _table(self, ctx: click.Context, key: str, option: click.Option, value: Any) -> None:
        """NAME=VALUE as a table."""
        found = self.tables.setdefault(str(option.name), {})
        if not isinstance(value, dict):
            self.mistake((key,), f"must be a table, like [{key}] and NAME = VALUE below it")
            return
        for name, content in value.items():
            if isinstance(content, bool) or not isinstance(content, str | int):
                self.mistake((key, name), f"{_shown(content)}: must be a string or a whole number")
            elif "\0" in f"{name}{content}":
                self.mistake((key, name), _NUL)
            elif not name or "=" in name:
                self.mistake((key, name), "not a name; it is empty, or has = in it")
            elif self._converts(ctx, option, [f"{name}={content}"], (key, name)):
                found[name] = str(content)

    def _converts(
        self, ctx: click.Context, option: click.Option, value: Any, where: toml_lines.Path
    ) -> bool:
        try:
            option.process_value(ctx, value)
        except click.ClickException as error:
            self.mistake(where, error.message.rstrip(".").replace("\n", " "))
        except UsageError as error:
            self.mistake(where, str(error))
        else:
            return True
        return False


def keys(params: Sequence[click.Parameter]) -> dict[str, click.Option]:
    """Return the options that have a key, by that."""
    found = {}
    for each in params:
        if isinstance(each, click.Option):
            key = next(name for name in each.opts if name.startswith("--")).removeprefix("--")
            if key not in NOT_HERE:
                found[key] = each
    return found


def _wrong_kind(option: click.Option, value: Any) -> str:
    """Say which kind of value an option takes, if this is another."""
    if option.is_flag:
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(option.type, click.types.IntParamType):
        fits = isinstance(value, int) and not isinstance(value, bool)
        return "" if fits else "a whole number"
    if isinstance(option.type, click.types.StringParamType | click.Choice):
        # No number: an umask of 022 would be another one.
        return "" if isinstance(value, str) else "a string, in quotes"
    fits = isinstance(value, str | int | float) and not isinstance(value, bool)
    return "" if fits else "a string or a number"


def _shown(value: Any) -> str:
    """A value, or of what does not fit into a line its kind."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
