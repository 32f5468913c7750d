"""The JSON form of values: the state, the settings, and the changes between two states.

Classes and fields are identified by name, so that a newer program can read an older program's
state.  A missing field takes its default, and a renamed field is found by its old name.
An older program ignores an unknown field, but refuses an unknown class, an unknown field of a
strict class (Codec), and an unknown value of an enumeration or a checked field; the error says why.

Pure.  All values that outlive a program use this serializer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum

from . import json_text
from .lazy_dataclass import default_of
from .text import shortened

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Increase this if old and new programs can no longer read each other's values.
FORMAT = 3


def _float(value: float) -> str:
    finite = value - value == 0
    return float.__repr__(value) if finite else json.dumps(value)


#: Functions that return the same text as json.dumps(), without its set-up cost.
_PLAIN: Mapping[type, Callable[[Any], str]] = {
    str: json.encoder.encode_basestring_ascii,
    int: int.__repr__,
    float: _float,
    bool: lambda value: "true" if value else "false",
    type(None): lambda _: "null",
}


class DecodeError(ValueError):
    """The bytes are no value of the codec's classes; the message says why."""


class NewerError(DecodeError):
    """A newer program has written the bytes; the message says what this program does not know."""


@contextmanager
def decoding() -> Iterator[None]:
    """Turn the errors of a malformed value into DecodeError."""
    try:
        yield
    except DecodeError:
        raise
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DecodeError(repr(error)) from error


def need_format(written: int) -> None:
    """Raise DecodeError if `written` is not this program's format."""
    if written > FORMAT:
        raise NewerError(f"format {written}, this one reads up to {FORMAT}")
    if written < FORMAT:
        raise DecodeError(
            f"written by an older version (format {written}, this one reads only {FORMAT}); "
            "stop that version, then start this one"
        )


def refusal(what: str, error: DecodeError) -> str:
    """Return why something cannot be read.  what: its name, such as `the state`."""
    why = str(error)
    if isinstance(error, NewerError):
        why = f"written by a newer version ({why}); start that version, or stop and start afresh"
    return f"{what} cannot be read: {why}"


class Codec:
    """The JSON form of a set of classes."""

    def __init__(
        self,
        classes: Iterable[type],
        *,
        renamed: Mapping[str, str] | None = None,
        strict: Collection[type] = (),
        added: Collection[str] = (),
        said: Collection[str] = (),
        checks: Mapping[str, Callable[[Any], bool]] | None = None,
    ) -> None:
        """classes: frozen dataclasses and enums with distinct names.

        renamed: `Class` or `Class.field` of an older program -> the name today.
        strict: classes whose unknown fields are refused, not dropped.
        added: `Class.field` that older programs lack; it is not written while it has its default.
        said: `Class.field` that is only for people.  Such fields are written separately, so that an
        older program skips them.
        checks: `Class.field` -> whether this program knows a value of the field; tuples are lists.
        """
        self._classes: Mapping[str, type] = {each.__name__: each for each in classes}
        self._fields: dict[type, tuple[str, ...]] = {
            each: each.__match_args__
            for each in self._classes.values()
            if hasattr(each, "__match_args__")
        }
        # Today's name of a class -> a field's old name -> the field's name today.
        self._renamed: dict[str, dict[str, str]] = {}
        self._older = dict(self._classes)
        for old, new in (renamed or {}).items():
            kind, _, name = old.partition(".")
            if name:
                self._renamed.setdefault(kind, {})[name] = new
            else:
                self._older[old] = self._classes[new]
        self._strict = strict
        self._added: dict[type, dict[str, Any]] = {}
        for each in added:
            kind, _, name = each.partition(".")
            known = self._classes[kind]
            self._added.setdefault(known, {})[name] = default_of(known, name)
        self._said: dict[type, list[str]] = {}
        for each in said:
            kind, _, name = each.partition(".")
            self._said.setdefault(self._classes[kind], []).append(name)
        self._checks: dict[type, dict[str, Callable[[Any], bool]]] = {}
        for each, knows in (checks or {}).items():
            kind, _, name = each.partition(".")
            self._checks.setdefault(self._classes[kind], {})[name] = knows

    def encode(self, value: object) -> bytes:
        """Return a value as bytes.

        The value consists of the codec's classes, tuples, frozensets and plain JSON values.  Raises
        TypeError for any other value.
        """
        return self._text(value).encode()

    def changes(self, old: object, new: object) -> bytes:
        """Return the changes from `old` to `new`, for decode(); empty if they are equal.

        Parts that are identical objects cost almost nothing.
        """
        found: list[str] = []
        self._compare("", old, new, found)
        return f"[{','.join(found)}]".encode() if found else b""

    def decode(self, data: bytes, changes: Iterable[bytes] = ()) -> Any:
        """Return the encoded value with all changes applied.  Raises DecodeError."""
        with decoding():
            tree = {"f": {"": json_text.parse(data)}}
            for each in changes:
                for change in json_text.parse(each):
                    _apply(tree, change)
            return self._value(tree["f"][""])

    def value_of(self, tree: Any) -> Any:
        """Return the value that a parsed JSON tree stands for.  Raises DecodeError."""
        with decoding():
            return self._value(tree)

    def _compare(self, path: str, old: object, new: object, found: list[str]) -> None:
        """Append each difference: a path, with a value, a slice, or a set's lost and new items.

        path: the names and indexes that lead to the difference, each after a comma.
        """
        if old is new:
            return
        if type(old) is type(new):
            names = self._fields.get(type(new))
            if names is not None:
                self._compare_fields(path, names, old, new, found)
                return
            if isinstance(old, tuple) and isinstance(new, tuple):
                self._compare_tuples(path, old, new, found)
                return
            if old == new:
                return
            if isinstance(old, frozenset) and isinstance(new, frozenset):
                less, more = self._text(tuple(old - new)), self._text(tuple(new - old))
                found.append(f'{{"p":[""{path}],"less":{less},"more":{more}}}')
                return
        found.append(f'{{"p":[""{path}],"v":{self._text(new)}}}')

    def _compare_fields(
        self, path: str, names: tuple[str, ...], old: object, new: object, found: list[str]
    ) -> None:
        known = type(new)
        if any(getattr(old, name) != getattr(new, name) for name in self._said.get(known, ())):
            found.append(f'{{"p":[""{path}],"v":{self._text(new)}}}')
            return
        added = self._added.get(known, {})
        for name in names:
            before, after = getattr(old, name), getattr(new, name)
            if name in added and before == added[name] != after:  # a default value was not written
                found.append(f'{{"p":[""{path},"{name}"],"v":{self._text(after)}}}')
            else:
                self._compare(f'{path},"{name}"', before, after, found)

    def _compare_tuples(
        self, path: str, old: tuple[object, ...], new: tuple[object, ...], found: list[str]
    ) -> None:
        first = _common_prefix(old, new)
        if len(old) == len(new) and old[first + 1 :] == new[first + 1 :]:
            if first < len(new):  # the usual case: one of a thousand items has changed
                self._compare(f"{path},{first}", old[first], new[first], found)
            return
        last = _common_prefix(old[first:][::-1], new[first:][::-1])
        before, after = old[first : len(old) - last], new[first : len(new) - last]
        if len(before) == len(after) and after and after[0] in before:
            # New items have replaced the oldest.  Without this case, each remaining item would be
            # written as a change, because its index has changed.
            gone = before.index(after[0])
            found.append(f'{{"p":[""{path}],"at":{first},"n":{gone},"v":[]}}')
            self._compare_tuples(path, old[:first] + old[first + gone :], new, found)
        elif len(before) == len(after):
            for at, (before_item, item) in enumerate(zip(before, after, strict=True), first):
                self._compare(f"{path},{at}", before_item, item, found)
        else:
            found.append(
                f'{{"p":[""{path}],"at":{first},"n":{len(before)},"v":{self._text(after)}}}'
            )

    def _text(self, value: object) -> str:
        plain = _PLAIN.get(type(value))
        if plain is not None:
            return plain(value)
        if isinstance(value, tuple):
            return f"[{','.join(map(self._text, value))}]"
        names = self._fields.get(type(value))
        if names is not None:
            parts: list[str] = []
            apart: list[str] = []
            added, said = self._added.get(type(value), {}), self._said.get(type(value), ())
            for name in names:
                part = getattr(value, name)
                if name in added and part == added[name]:
                    continue
                plain = _PLAIN.get(type(part)) or self._text
                (apart if name in said else parts).append(f'"{name}":{plain(part)}')
            more = f',"said":{{{",".join(apart)}}}' if apart else ""
            return f'{{"c":"{type(value).__name__}","f":{{{",".join(parts)}}}{more}}}'
        if isinstance(value, bytes):
            return f'{{"b":"{value.hex()}"}}'
        if isinstance(value, frozenset):
            return f'{{"s":{self._text(tuple(sorted(value, key=repr)))}}}'
        if isinstance(value, Enum) and type(value).__name__ in self._classes:
            return f'{{"e":"{type(value).__name__}","v":{self._text(value.value)}}}'
        if isinstance(value, int):  # such as signal.Signals, a named subclass
            return int.__repr__(value)
        raise TypeError(f"{type(value).__name__} is no part of the state")

    def _value(self, value: Any) -> object:
        if isinstance(value, list):
            return tuple(self._value(each) for each in value)
        if not isinstance(value, dict):
            return value
        if "b" in value:
            return bytes.fromhex(value["b"])
        if "s" in value:
            return frozenset(self._value(each) for each in value["s"])
        if "e" in value:
            return self._member(value["e"], value["v"])
        if value["c"] not in self._older:
            raise NewerError(f"this one does not know {value['c']}")
        known = self._older[value["c"]]
        names, plain = self._fields[known], _PLAIN
        found = self._today(known, value["f"])
        if known in self._strict and (unknown := found.keys() - set(names)):
            raise NewerError(f"this one does not know {', '.join(sorted(unknown))}")
        for name, knows in self._checks.get(known, {}).items():
            if name in found and not knows(found[name]):
                raise NewerError(f"this one does not know {name} {shortened(repr(found[name]))}")
        return known(
            **{
                name: v if type(v) in plain else self._value(v)
                for name, v in (found | value.get("said", {})).items()
                if name in names
            }
        )

    def _member(self, name: str, value: object) -> object:
        """Return the member of an enumeration.  name: of its class."""
        if name not in self._older:
            raise NewerError(f"this one does not know {name}")
        try:
            return self._older[name](value)
        except ValueError:
            raise NewerError(f"this one does not know {name} {shortened(repr(value))}") from None

    def _today(self, known: type, written: dict[str, Any]) -> dict[str, Any]:
        """Return a class's written fields under their names of today."""
        renamed = self._renamed.get(known.__name__)
        if renamed is None:
            return written
        return {renamed.get(field, field): value for field, value in written.items()}


def _common_prefix(first: tuple[object, ...], second: tuple[object, ...]) -> int:
    """Return the number of equal items at the beginning of both tuples.

    Bisection is faster than a loop, because Python compares slices in C.
    """
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _apply(tree: Any, change: Any) -> None:
    """Apply one change to a value's parsed JSON tree."""
    *path, last = change["p"]
    holder = tree["f"]
    for step in path:
        inside = holder[step]
        holder = inside if isinstance(inside, list) else inside["f"]
    if "at" in change:
        holder[last][change["at"] : change["at"] + change["n"]] = change["v"]
    elif "less" in change:
        kept = [each for each in holder[last]["s"] if each not in change["less"]]
        holder[last]["s"] = kept + change["more"]
    else:
        holder[last] = change["v"]
