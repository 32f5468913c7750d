"""Dataclasses that compile nothing when they are defined, and make no second class.

In each process, `@dataclass` compiles the functions of each class: six for an immutable class.  The
resident process has more than a hundred classes, and after an upgrade or a kill it accepts no
client until it has loaded them.  So here, all classes share the functions that compare, hash and
show values.  `__init__` is compiled for the second object of a class, because most classes have at
most one object.  `__dataclass_fields__` is made at its first use, which loads `dataclasses`
(0.14 MB).

With `@dataclass(slots=True)` instead, a resident process that resumes needs 1.24 times the CPU:
313 ms against 261, on a busy machine with Python 3.11.  `python -m bench upgrade survive` takes
1.46 and 1.15 times as long: 228 and 220 ms more.  RssAnon of an idle protector grows by 0.8 MB.
These figures are medians of 25 pairs of alternating runs.

Slots would need a second class for each class, because Python reads `__slots__` when it makes a
class.  The first class would be 2 KB of garbage that is never collected.  Since Python 3.11 a value
without slots is as small as one with slots.
"""

from __future__ import annotations

from operator import attrgetter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import KW_ONLY as KW_ONLY
    from dataclasses import replace as replace
    from typing import Any, TypeVar, dataclass_transform

    _T = TypeVar("_T")
else:
    KW_ONLY = None  # only an annotation, never evaluated

    def dataclass_transform(**_):
        """Do nothing, like typing.dataclass_transform, which costs the process a megabyte."""
        return lambda made: made

    def replace(value, /, **changes):
        """Return a value with changed fields, as dataclasses.replace() does.

        dataclasses.replace() itself would load `dataclasses`, and `inspect` in Python 3.12.
        """
        return type(value)(**{name: getattr(value, name) for name in value._names} | changes)


#: Stands for a missing value.
_MISSING: Any = object()


class _Factory:
    """A default value that is made for each object by calling `make`."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def field(*, default_factory: Callable[[], _T]) -> _T:
    """Declare a field whose default is made for each object by calling `default_factory`."""
    return _Factory(default_factory)  # type: ignore[return-value]


@dataclass_transform(eq_default=False, field_specifiers=(field,))
def mutable(cls: type[_T]) -> type[_T]:
    """Give a class an `__init__` that sets its annotated fields.

    Fields are not inherited, and field() supports only default_factory.
    """
    made: Any = cls
    names = positional = tuple(cls.__annotations__)
    if "_" in names:  # KW_ONLY
        at = names.index("_")
        positional, names = names[:at], names[:at] + names[at + 1 :]
    body = vars(cls)
    made._defaults = {name: body[name] for name in names if name in body}
    for name in made._defaults:
        delattr(cls, name)
    made._names, made.__init__ = names, _init_of_first
    made.__match_args__ = positional  # type: ignore[misc]
    made.__dataclass_fields__ = _Fields()
    return cls


class _Fields:
    """The `__dataclass_fields__` of a class, which are made at their first use."""

    __slots__ = ()

    def __get__(self, one: object, cls: Any) -> Any:
        import dataclasses

        body: dict[str, Any] = {"__annotations__": dict.fromkeys(cls._names, "object")}
        for name in cls._names:
            default = cls._defaults.get(name, dataclasses.MISSING)
            how: dict[str, Any] = {"default": default}
            if isinstance(default, _Factory):
                how = {"default_factory": default.make}
            body[name] = dataclasses.field(kw_only=name not in cls.__match_args__, **how)
        made: Any = type(cls.__name__, (), body)
        plain: Any = dataclasses.dataclass(init=False, repr=False, eq=False)(made)
        cls.__dataclass_fields__ = plain.__dataclass_fields__
        return cls.__dataclass_fields__


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[_T]) -> type[_T]:
    """Make a class a value: its objects are compared, hashed and shown by their fields.

    Only the type checker prevents setting a field.
    """
    made: Any = mutable(cls)
    #: Returns all fields at once.
    made._of = attrgetter(*(made._names or ["__class__"]))
    made.__eq__, made.__hash__, made.__repr__ = _equal, _hash, _repr
    return made  # type: ignore[no-any-return]


def _init_of_first(self: Any, *values: Any, **named: Any) -> None:
    cls: Any = type(self)
    cls.__init__ = _init_of_second
    given = {**dict(zip(cls.__match_args__, values, strict=False)), **named}
    wrong = len(given) < len(values) + len(named)
    for name in cls._names:
        value: Any = given.pop(name, _MISSING)
        if value is _MISSING:
            value = cls._defaults.get(name, _MISSING)
            if isinstance(value, _Factory):
                value = value.make()
        wrong |= value is _MISSING
        setattr(self, name, value)
    if wrong or given:
        init_of(cls)(self, *values, **named)  # raises Python's TypeError for these arguments
    elif hasattr(cls, "__post_init__"):
        self.__post_init__()


def _init_of_second(self: Any, *values: Any, **named: Any) -> None:
    cls: Any = type(self)
    cls.__init__ = init_of(cls)
    cls.__init__(self, *values, **named)


def init_of(cls: type) -> Any:
    """Return a compiled `__init__` of a class, as @dataclass makes it."""
    made: Any = cls
    parameters, lines = ["self"], ["pass"]
    known: dict[str, Any] = {}
    for number, name in enumerate(made._names):
        value = name
        if number == len(made.__match_args__):
            parameters.append("*")
        parameters.append(f"{name}=_default_{name}" if name in made._defaults else name)
        default = known[f"_default_{name}"] = made._defaults.get(name)
        if isinstance(default, _Factory):
            known[f"_make_{name}"] = default.make
            value = f"_make_{name}() if {name} is _default_{name} else {name}"
        lines.append(f"self.{name} = {value}")
    if hasattr(cls, "__post_init__"):
        lines.append("self.__post_init__()")
    exec(f"def __init__({', '.join(parameters)}):\n " + "\n ".join(lines), known)
    return known["__init__"]


def default_of(cls: Any, name: str) -> Any:
    """Return the default of a field."""
    return cls._defaults[name]


def as_dict(value: Any) -> dict[str, Any]:
    """Return a value's fields by name, with nested values as dicts, too.

    dataclasses.asdict() would also copy the values, and load a module of 170 KB for that.
    """
    return {name: _as_plain(getattr(value, name)) for name in value._names}


def _as_plain(value: Any) -> Any:
    if hasattr(value, "_defaults"):
        return as_dict(value)
    if isinstance(value, tuple):
        return tuple(map(_as_plain, value))
    return value


def _equal(self: Any, other: Any) -> Any:
    if type(other) is not type(self):
        return NotImplemented
    return self._of(self) == self._of(other)


def _hash(self: Any) -> int:
    return hash(self._of(self))


def _repr(self: Any) -> str:
    shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._names)
    return f"{self.__class__.__qualname__}({shown})"
