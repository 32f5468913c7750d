"""Reads the values of options from a TOML file, and reports each mistake with its line.

A key is an option's name without its leading dashes (`start-timeout = "10s"`), or `listen`, or
`command`.  Values are converted as on the command line, so the errors are the same.

Mistakes are collected, and raised together after the whole file has been read.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import click

from ..model.errors import Mistaken, UsageError
from ..model.text import escape, in_one_line
from ..system import env_file
from . import toml_lines
from .option_values import FLAG, SURGE, TIME
from .options import OPTIONS, Option

_OPTIONS = {each.key: each for each in OPTIONS}

#: An option that an error names.
_NAMED = re.compile(r"--([a-z-]+)")
#: The beginning of an error that names an option: `--chdir /x: `, `--limit nofile=x: `, `--shell `.
#: The second group is only in an error that is still clear without the option's name.
_OPTION = re.compile(r"--([a-z-]+)( (?=[^ ]*: |[^ ]+=)|: )?")
_NUL = "must not contain a NUL"
_NOT_IN_LOCALE = "has a character that this locale cannot encode; set LC_ALL=C.UTF-8"
LISTEN, COMMAND, ENV = "listen", "command", "env"
#: Every key of a file.
_KEYS = (*(key for key, each in _OPTIONS.items() if not each.no_key), LISTEN, COMMAND)
#: A number with more digits than Python converts (sys.get_int_max_str_digits()).
_DIGITS = re.compile(r"[0-9_]{4300}")
_PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)\Z")


class ConfigFile:
    """A configuration file that was read, and the mistakes found in this file so far."""

    def __init__(self, path: str) -> None:
        """Read a file, and check every key.

        Raises Mistaken if the file is not TOML, and UsageError if it cannot be read.
        """
        self.path = path
        #: Relative paths in the file start at this folder.  Each reload follows symbolic links in
        #: the folder's path again.
        self.folder = os.path.dirname(path)
        self.listens: tuple[str, ...] = ()
        self.command: tuple[str, ...] = ()
        #: Values of options by the parameter's name, as they would be written on a command line.
        self.values: dict[str, Any] = {}
        #: The entries of repeatable options, by the parameter's name: NAME -> VALUE.
        self.tables: dict[str, dict[str, str]] = {}
        #: The keys that the command line overrides; their lines here are no mistake.
        self.overridden: Collection[str] = ()
        #: The line, the key (with the name in a table) and the reason of each mistake.
        self._mistakes: list[tuple[int, str, str]] = []
        read, self._places = self._parse()
        for key, value in read.items():
            self._take(key, value)

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
            raise Mistaken(self._line(line, "not UTF-8, as TOML must be")) from error
        except tomllib.TOMLDecodeError as error:
            found = _PLACE.search(str(error))
            at_end = data.rstrip().count(b"\n") + 1
            line = int(found[1]) if found and found[1] else at_end
            reason = str(error).removesuffix(found[0] if found else "")
            raise Mistaken(self._line(line, f"not TOML: {reason}")) from error
        except ValueError as error:  # Python converts no number of more than 4,300 digits
            found = _DIGITS.search(text)
            line = text.count("\n", 0, found.start() if found else 0) + 1
            raise Mistaken(self._line(line, "a number has too many digits")) from error
        except RecursionError as error:
            raise Mistaken(self._line(1, "nested too deeply")) from error

    # -- mistakes --------------------------------------------------------------

    def mistake(self, where: toml_lines.Path, reason: str) -> None:
        """Record a mistake of a key, or of a value in a list."""
        names = ".".join(each for each in where if isinstance(each, str))
        self._mistakes.append((self._places.get(where, 1), names, reason))

    @contextmanager
    def about(self, *where: str | int) -> Iterator[None]:
        """Record a UsageError of the block as a mistake of this key, instead of raising it.

        An error that names another mistaken option is omitted: it may follow from that mistake.
        """
        try:
            yield
        except UsageError as error:
            mistaken = {names.partition(".")[0] for _, names, _ in self._mistakes}
            if mistaken & {*_NAMED.findall(str(error))} - {str(where[0])}:
                return
            if not self._about_its_option(error, where):
                self.mistake(where, str(error))

    def _about_its_option(self, error: UsageError, where: toml_lines.Path) -> bool:
        """Record an error that begins with an option of the file as a mistake of this option.

        where: the key that was checked; empty if this key is not in the file.  Returns False if the
        error begins with no option of the file.
        """
        option = _OPTION.match(str(error))
        if option is None:
            return False
        name = option[1]
        if where[:1] != (name,):
            if (name,) not in self._places or name in self.overridden:
                return False
            where = (name,)
        self.mistake(where, str(error)[option.end() if option[2] else 0 :])
        return True

    @contextmanager
    def mistakes_first(self) -> Iterator[None]:
        """If the block raises a UsageError, raise the file's mistakes instead, if there are any.

        If there are none, but the error begins with an option of the file, raise it as a mistake.
        """
        try:
            yield
        except UsageError as error:
            self.refuse_if_mistaken()
            if self._about_its_option(error, ()):
                self.refuse_if_mistaken()
            raise

    def refuse_if_mistaken(self, keys: Collection[str] = ()) -> None:
        """Raise Mistaken if any mistake was recorded.  keys: only mistakes of these keys count."""
        mistakes = sorted(each for each in self._mistakes if not keys or each[1] in keys)
        if mistakes:
            lines = dict.fromkeys(self._line(n, f"{key}: {reason}") for n, key, reason in mistakes)
            raise Mistaken("\n".join(lines))

    def _line(self, number: int, reason: str) -> str:
        return escape(f"{self.path} line {number}: {reason}")

    # -- values ----------------------------------------------------------------

    def _take(self, key: str, value: Any) -> None:
        """Put valid entries into `values`, `tables`, `listens` and `command`."""
        if key == LISTEN:
            self._listen(value)
        elif key == COMMAND:
            if self._are_strings(key, value, 'a list of words, like ["./daemon", "4321"]'):
                self.command = tuple(value)
        elif (option := _OPTIONS.get(key)) is not None:
            if option.no_key:
                self.mistake((key,), f"has no place in a file; {option.no_key}")
            else:
                self._option(key, option, value)
        else:
            near = get_close_matches(key, _KEYS, 1)
            what = f"did you mean {near[0]}?" if near else "docs/reference.md lists them"
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
            elif why := _unusable(each):
                self.mistake((key, index), why)
                wrong += 1
        return not wrong

    def _option(self, key: str, option: Option, value: Any) -> None:
        if option.multiple:
            self._table(key, option, value)
        elif isinstance(value, str) and (why := _unusable(value)):
            self.mistake((key,), why)
        elif wanted := _wrong_kind(option, value):
            self.mistake((key,), f"{_shown(value)}: must be {wanted}")
        else:
            given = value if isinstance(value, bool) else str(value)
            if self._converts(option, given, (key,)):
                self.values[str(option.name)] = given

    def _table(self, key: str, option: Option, value: Any) -> None:
        """Check a table of NAME = VALUE, and put its valid entries into `tables`."""
        found = self.tables.setdefault(str(option.name), {})
        if not isinstance(value, dict):
            self.mistake((key,), f"must be a table, like [{key}] and NAME = VALUE below it")
            return
        for name, content in value.items():
            if key == ENV and name in _KEYS:  # in TOML, each key below [env] is in that table
                why = "the name of an option; write it above [env], or the variable to env-file"
                self.mistake((key, name), why)
            elif isinstance(content, bool) or not isinstance(content, str | int):
                self.mistake((key, name), f"{_shown(content)}: must be a string or a whole number")
            elif why := _unusable(f"{name}{content}"):
                self.mistake((key, name), why)
            elif not name or "=" in name:
                self.mistake((key, name), "not a name; it is empty, or has = in it")
            elif self._converts(option, f"{name}={content}", (key, name)):
                found[name] = str(content)

    def _converts(self, option: Option, value: Any, where: toml_lines.Path) -> bool:
        try:
            option.kind.convert(value, None, None)
        except click.ClickException as error:
            self.mistake(where, in_one_line(error.message))
            return False
        return True


def _unusable(text: str) -> str:
    """Return why this text cannot be passed to a system call; "" if it can."""
    try:
        return _NUL if b"\0" in os.fsencode(text) else ""
    except UnicodeEncodeError:
        return _NOT_IN_LOCALE


def _wrong_kind(option: Option, value: Any) -> str:
    """Return the kind of value that an option takes; "" if this value is of that kind."""
    if option.kind is FLAG:
        return "" if isinstance(value, bool) else "true or false"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(option.kind, click.types.IntParamType):
        return "" if is_number and isinstance(value, int) else "a whole number"
    if isinstance(option.kind, type(TIME)):
        return "" if is_number or isinstance(value, str) else "a string or a number"
    if option.kind is SURGE:
        is_whole = is_number and isinstance(value, int)
        return "" if is_whole or isinstance(value, str) else "a string or a whole number"
    # A number is refused: an umask of 022 would be read as decimal.
    return "" if isinstance(value, str) else "a string, in quotes"


def _shown(value: Any) -> str:
    """Return a value as text for an error; for a table or list, only its kind."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
