"""Dataclasses with slots that compile nothing when they are defined.

`@dataclass` compiles its functions in each process anew: six of an immutable class, a millisecond,
and the resident process has a hundred classes.  No client is accepted while a new program starts,
at an upgrade or after a kill.  So how values are compared, hashed and shown is here once, for all
of them; and `__init__` is compiled with the second object of a class: of most there is one or none.
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


@dataclass_transform(eq_default=False, field_specifiers=(field,))
def mutable(cls: type[_T]) -> type[_T]:
    """Have the annotated fields as slots, set by `__init__`; to be written above the class."""
    made: Any = dataclass(slots=True, init=False, repr=False, eq=False)(cls)
    made.__init__ = _first
    return made  # type: ignore[no-any-return]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[_T]) -> type[_T]:
    """Make it a value, compared, hashed and shown by its fields.

    That nobody sets a field is for the type checker to see.
    """
    made: Any = mutable(cls)
    #: Takes all fields at once.
    made._of = attrgetter(*([each.name for each in fields(made)] or ["__class__"]))
    made.__eq__, made.__hash__, made.__repr__ = _equal, _hash, _show
    return made  # type: ignore[no-any-return]


def _first(self: Any, *values: Any, **named: Any) -> None:
    cls: Any = type(self)
    cls.__init__ = _second
    positional = [each.name for each in fields(cls) if not each.kw_only]
    given = {**dict(zip(positional, values, strict=False)), **named}
    wrong = len(given) < len(values) + len(named)
    for each in fields(cls):
        if each.default_factory is not MISSING and each.name not in given:
            value: Any = each.default_factory()
        else:
            value = given.pop(each.name, each.default)
        wrong |= value is MISSING
        setattr(self, each.name, value)
    if wrong or given:
        init_of(cls)(self, *values, **named)  # raises what Python says of such arguments
    elif hasattr(cls, "__post_init__"):
        self.__post_init__()


def _second(self: Any, *values: Any, **named: Any) -> None:
    cls: Any = type(self)
    cls.__init__ = init_of(cls)
    cls.__init__(self, *values, **named)


def init_of(cls: type) -> Any:
    """Compile what sets the fields of a class, as a dataclass has it."""
    parameters, by_name, lines = ["self"], ["*"], ["pass"]
    known: dict[str, Any] = {}
    for each in fields(cls):
        name = value = each.name
        required = each.default is MISSING and each.default_factory is MISSING
        to = by_name if each.kw_only else parameters
        to.append(name if required else f"{name}=_default_{name}")
        known[f"_default_{name}"] = each.default
        if each.default_factory is not MISSING:
            known[f"_make_{name}"] = each.default_factory
            value = f"_make_{name}() if {name} is _default_{name} else {name}"
        lines.append(f"self.{name} = {value}")
    if len(by_name) > 1:
        parameters += by_name
    if hasattr(cls, "__post_init__"):
        lines.append("self.__post_init__()")
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
