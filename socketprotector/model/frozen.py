"""Immutable values: dataclasses with slots, compared, hashed and shown by their fields.

As `@dataclass(frozen=True, slots=True)`, which compiles six functions for each class: a
millisecond, and the resident process has some seventy. No client is accepted while a new program
starts, at an upgrade or after a kill; so all but `__init__` are here once, for all of them, and
that is compiled with the first value of a class: of most there is none yet when the first worker
starts. That nobody sets a field is for the type checker to see.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from operator import attrgetter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar, dataclass_transform

    _T = TypeVar("_T")
else:

    def dataclass_transform(**_):
        """Do nothing: `typing` would cost the resident process a megabyte."""
        return lambda made: made


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[_T]) -> type[_T]:
    """Make a class with annotated fields one of such values; to be written above it."""
    made: Any = dataclass(slots=True, init=False, repr=False, eq=False)(cls)
    #: Takes all fields at once.
    made._of = attrgetter(*([each.name for each in fields(made)] or ["__class__"]))
    made.__init__ = _first
    made.__eq__, made.__hash__, made.__repr__ = _equal, _hash, _show
    return made  # type: ignore[no-any-return]


def _first(self: Any, *values: Any, **named: Any) -> None:
    cls: Any = type(self)
    cls.__init__ = init_of(cls)
    cls.__init__(self, *values, **named)


def init_of(cls: type) -> Any:
    """Compile what sets the fields of a class, as a dataclass has it."""
    parameters, lines = ["self"], ["pass"]
    known: dict[str, Any] = {}
    for each in fields(cls):
        name = value = each.name
        required = each.default is MISSING and each.default_factory is MISSING
        parameters.append(name if required else f"{name}=_default_{name}")
        known[f"_default_{name}"] = each.default
        if each.default_factory is not MISSING:
            known[f"_make_{name}"] = each.default_factory
            value = f"_make_{name}() if {name} is _default_{name} else {name}"
        lines.append(f"self.{name} = {value}")
    exec(f"def __init__({', '.join(parameters)}):\n " + "\n ".join(lines), known)
    return known["__init__"]


def _equal(self: Any, other: Any) -> Any:
    if type(other) is not type(self):
        return NotImplemented
    return self._of(self) == self._of(other)


def _hash(self: Any) -> int:
    return hash(self._of(self))


def _show(self: Any) -> str:
    shown = ", ".join(f"{each.name}={getattr(self, each.name)!r}" for each in fields(self))
    return f"{self.__class__.__qualname__}({shown})"
