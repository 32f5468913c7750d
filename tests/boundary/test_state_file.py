"""What outlives the program: written whole or not at all, read by the next version too."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from enum import Enum
from functools import cache
from itertools import pairwise
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from socketprotector.core.events import Deadline
from socketprotector.core.fleet import Fleet, Generation, Worker
from socketprotector.core.snapshot import CLASSES, CODEC, Snapshot
from socketprotector.daemon import checkpoint
from socketprotector.model.codec import FORMAT, Codec, DecodeError, NewerError
from socketprotector.model.handoff_modes import MODES
from socketprotector.model.lazy_dataclass import frozen, init_of
from socketprotector.model.log_format import FORMATS, LEVELS
from socketprotector.model.policy import Policy
from socketprotector.model.ready_kinds import KINDS
from socketprotector.model.records import (
    ForwarderRecord,
    GenerationRecord,
    Program,
    SettingsRecord,
    WorkerRecord,
)
from socketprotector.model.settings import LIMITS, ListenerSettings, Settings
from socketprotector.system import state_file
from socketprotector.system.state_file import StateError, StateFile
from tests.rounds import rounds
from tests.together import together

#: A snapshot with all that can be in it takes 50 ms of a processor to be thought of.
SNAPSHOTS = rounds(4, 100)
SETTINGS = SettingsRecord(Settings("x", ("./daemon",), "/"))
#: What a name of a file or a variable can be: bytes that are no UTF-8 too.
texts = st.text(st.characters(exclude_categories=()), max_size=8)
st.register_type_strategy(str, texts)
st.register_type_strategy(float, st.floats(allow_nan=False))


def with_parameters(made: Any) -> None:
    """Have hypothesis see of which fields a value is made."""
    made.__init__ = init_of(made)
    made.__init__.__annotations__ = get_type_hints(made)


for _each in CLASSES:
    if is_dataclass(_each):
        with_parameters(_each)
#: Values of fields that are checked (CHECKS of model/settings.py).
CHECKED = {
    "handoff": st.sampled_from([*MODES]),
    "ready": st.sampled_from([*KINDS]),
    "ready_question": st.sampled_from(["", "accept", "http:/"]),
    "settle_check": st.sampled_from(["", "http:/", "check:true"]),
    "health": st.sampled_from(["", "accept", "check:true"]),
    "limits": st.lists(st.tuples(st.sampled_from(LIMITS), st.integers())).map(tuple),
    "log_level": st.sampled_from([*LEVELS]),
    "log_format": st.sampled_from(FORMATS),
    "address": st.sampled_from(["tcp:127.0.0.1:80", "tcp:[::1]:80", "unix:/x", "unix:@x"]),
}
for _class in (Settings, Policy, Program, ListenerSettings, Snapshot):
    _fields = {name: CHECKED.get(name, ...) for name in _class.__match_args__}
    st.register_type_strategy(_class, st.builds(_class, **_fields))
# Made by the tests that take from them: each process of `pytest -n` collects all tests.
snapshots = st.deferred(lambda: st.from_type(Snapshot))
values = st.deferred(lambda: st.one_of(*(st.from_type(each) for each in CLASSES)))


@contextmanager
def opened() -> Iterator[StateFile]:
    made = StateFile.make()
    try:
        yield made
    finally:
        os.close(made.fd)


@pytest.fixture
def file() -> Iterator[StateFile]:
    with opened() as made:
        yield made


# --- values -------------------------------------------------------------------


@settings(max_examples=SNAPSHOTS, deadline=None, suppress_health_check=list(HealthCheck))
@given(snapshots)
def test_a_snapshot_comes_back_as_it_was(snapshot: Snapshot) -> None:
    assert CODEC.decode(CODEC.encode(snapshot)) == snapshot


@settings(max_examples=rounds(8, 400), deadline=None, suppress_health_check=list(HealthCheck))
@given(values)
def test_every_class_of_it_comes_back_as_it_was(value: object) -> None:
    again = CODEC.decode(CODEC.encode(value))

    assert again == value
    assert type(again) is type(value)


def test_no_two_classes_have_one_name() -> None:
    assert len({each.__name__ for each in CLASSES}) == len(CLASSES)


def one_more_step(draw: st.DrawFn, snapshot: Snapshot) -> Snapshot:
    """What a step of the lifecycle does to a snapshot: a part is another, comes or goes."""
    workers, generations = list(snapshot.workers), list(snapshot.fleet.generations)
    match draw(st.integers(0, 6)):
        case 0:
            workers.insert(draw(st.integers(0, len(workers))), draw(st.from_type(WorkerRecord)))
        case 1 if workers:
            del workers[draw(st.integers(0, len(workers) - 1))]
        case 2 if workers:
            at = draw(st.integers(0, len(workers) - 1))
            workers[at] = replace(
                workers[at], status=draw(texts), asked_to_exit=draw(st.booleans())
            )
        case 3:
            generations.append(draw(st.from_type(Generation)))
        case 4 if generations:
            at = draw(st.integers(0, len(generations) - 1))
            entries = (*generations[at].workers, draw(st.from_type(Worker)))
            generations[at] = replace(generations[at], workers=entries)
        case 5:
            timers = draw(st.frozensets(st.from_type(Deadline), max_size=3))
            fleet = replace(snapshot.fleet, timers=snapshot.fleet.timers ^ timers)
            record = ForwarderRecord(pending=draw(st.none() | st.binary(max_size=3)))
            return replace(snapshot, fleet=fleet, forwarder=record)
        case _:
            return draw(snapshots)
    fleet = replace(snapshot.fleet, generations=tuple(generations))
    return replace(snapshot, workers=tuple(workers), fleet=fleet)


@st.composite
def steps(draw: st.DrawFn) -> list[Snapshot]:
    found = [draw(snapshots)]
    for _ in range(draw(st.integers(0, 6))):
        found.append(one_more_step(draw, found[-1]))
    return found


@settings(max_examples=SNAPSHOTS, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps())
def test_a_snapshot_and_what_has_changed_since_is_the_one_that_holds(steps: list[Snapshot]) -> None:
    changes = [CODEC.changes(one, other) for one, other in pairwise(steps)]

    assert CODEC.decode(CODEC.encode(steps[0]), filter(None, changes)) == steps[-1]


def test_what_has_not_changed_is_not_written_again() -> None:
    workers = tuple(WorkerRecord(number, 1, 100 + number, 0) for number in range(600))
    before = Snapshot(Fleet(), SETTINGS, workers=workers)
    status = replace(workers[300], status="busy")
    after = replace(before, workers=(*workers[:300], status, *workers[301:]))
    fewer = replace(before, workers=(*workers[:300], *workers[301:]))

    assert CODEC.changes(before, replace(before)) == b""
    assert len(CODEC.changes(before, after)) < 100
    assert len(CODEC.changes(before, fewer)) < 100


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Thing:
    size: int
    colour: Colour = Colour.RED
    parts: tuple[int, ...] = ()


def test_a_field_that_an_older_program_did_not_write_takes_its_default() -> None:
    written = b'{"c":"Thing","f":{"size":3}}'

    assert Codec([Thing, Colour]).decode(written) == Thing(3, Colour.RED, ())


def test_a_field_that_this_program_does_not_know_is_dropped() -> None:
    written = json.loads(Codec([Thing, Colour]).encode(Thing(3, parts=(1, 2))))
    written["f"]["weight"] = {"c": "Unknown", "f": {"of": {"e": "Neither", "v": 1}}}

    again = Codec([Thing, Colour]).decode(json.dumps(written).encode())

    assert again == Thing(3, Colour.RED, (1, 2))


def test_what_was_renamed_is_read_by_its_old_name_and_written_by_its_own() -> None:
    renamed = {"Object": "Thing", "Hue": "Colour", "Thing.length": "size"}
    codec = Codec([Thing, Colour], renamed=renamed)
    written = b'{"c":"Object","f":{"length":3,"colour":{"e":"Hue","v":"red"},"parts":[1]}}'

    assert codec.decode(written) == Thing(3, Colour.RED, (1,))
    assert codec.encode(Thing(3)) == Codec([Thing, Colour]).encode(Thing(3))


def test_an_unknown_field_of_a_strict_class_is_a_newer_program_s() -> None:
    with pytest.raises(NewerError, match="does not know weight"):
        Codec([Thing], strict=[Thing]).decode(b'{"c":"Thing","f":{"size":3,"weight":1}}')


def test_an_unknown_value_of_an_enumeration_is_a_newer_program_s() -> None:
    with pytest.raises(NewerError, match="does not know Colour 'teal'"):
        Codec([Thing, Colour]).decode(b'{"c":"Thing","f":{"colour":{"e":"Colour","v":"teal"}}}')


def test_a_value_that_a_check_does_not_know_is_a_newer_program_s() -> None:
    """Also if a change has set it."""
    codec = Codec([Thing, Colour], checks={"Thing.size": lambda size: size < 5})
    written = codec.encode(Thing(4))
    assert codec.decode(written) == Thing(4)

    with pytest.raises(NewerError, match="does not know size 5"):
        codec.decode(written, [codec.changes(Thing(4), Thing(5))])


@together(
    ("of", "name", "value"),
    [
        *(("Program", each, "pigeon") for each in ("handoff", "ready", "ready_question")),
        ("Program", "settle_check", "grpc:/"),
        ("Program", "limits", [["stack", 1]]),
        ("Settings", "health", "ping:"),
        ("ListenerSettings", "address", "vsock:7"),
        ("ListenerSettings", "address", "tcp6:7"),
        ("Snapshot", "log_level", "notice"),
    ],
)
def test_a_snapshot_with_a_value_of_a_newer_program_is_refused(
    of: str, name: str, value: object
) -> None:
    program = Program("./web", ("./web",), "/", (), 0, (), 0)
    settings = replace(SETTINGS.current, listeners=(ListenerSettings("unix:/x"),))
    snapshot = Snapshot(
        Fleet(), SettingsRecord(settings), generations=(GenerationRecord(1, program),)
    )
    written = json.loads(CODEC.encode(snapshot))
    assert CODEC.decode(json.dumps(written).encode()) == snapshot
    inside = {
        "Program": written["f"]["generations"][0]["f"]["program"],
        "Settings": written["f"]["settings"]["f"]["current"],
        "ListenerSettings": written["f"]["settings"]["f"]["current"]["f"]["listeners"][0],
        "Snapshot": written,
    }
    assert inside[of]["c"] == of
    inside[of]["f"][name] = value

    with pytest.raises(NewerError, match=f"does not know {name} "):
        CODEC.decode(json.dumps(written).encode())


def test_a_long_value_is_shortened_in_the_refusal() -> None:
    codec = Codec([Thing, Colour], checks={"Thing.size": lambda _: False})
    with pytest.raises(NewerError, match=r"^this one does not know size 1{40}\.\.\.$"):
        codec.decode(codec.encode(Thing(int("1" * 500))))
    colour = b'{"c":"Thing","f":{"colour":{"e":"Colour","v":"%s"}}}' % (b"x" * 500)
    with pytest.raises(NewerError, match=r"^this one does not know Colour 'x{39}\.\.\.$"):
        codec.decode(colour)


def test_an_enumeration_of_a_newer_program_is_named() -> None:
    with pytest.raises(NewerError, match="does not know Shade"):
        Codec([Thing]).decode(b'{"c":"Thing","f":{"colour":{"e":"Shade","v":"red"}}}')


def newer_thing(name: str, annotation: str, default: object) -> Any:
    """The Thing of a newer program, which has one field more."""
    annotations = {**Thing.__annotations__, name: annotation}
    defaults = {"colour": Colour.RED, "parts": (), name: default}
    return frozen(type("Thing", (), {"__annotations__": annotations, **defaults}))


def test_what_an_older_program_does_not_know_is_written_only_where_it_is_used() -> None:
    """A field at its default is not written, so a change of its parts would change nothing."""
    tagged = newer_thing("tags", "tuple[int, ...]", (1,))
    newer = Codec([tagged, Colour], strict=[tagged], added=["Thing.tags"])
    older = Codec([Thing, Colour], strict=[Thing])
    plain, used = tagged(3), tagged(3, tags=(1, 2))
    changes = [newer.changes(*each) for each in ((plain, used), (used, plain))]

    assert older.decode(newer.encode(plain)) == Thing(3)
    with pytest.raises(NewerError, match="does not know tags"):
        older.decode(newer.encode(used))
    assert newer.decode(newer.encode(plain), changes[:1]) == used
    assert newer.decode(newer.encode(plain), changes) == plain
    assert newer.decode(newer.encode(used), changes[1:]) == plain


def test_an_older_program_passes_over_what_is_only_for_people() -> None:
    """Also where it came as a change, and where another field changes after it."""
    noted = newer_thing("notes", "tuple[str, ...]", ())
    newer = Codec([noted, Colour], strict=[noted], added=["Thing.notes"], said=["Thing.notes"])
    older = Codec([Thing, Colour], strict=[Thing])
    steps = [noted(3), noted(4, notes=("a",)), noted(5, notes=("a",)), noted(5, notes=("b", "c"))]
    changes = [newer.changes((one,), (other,)) for one, other in pairwise(steps)]

    for count, each in enumerate(steps):
        assert newer.decode(newer.encode(each)) == each
        assert older.decode(newer.encode(each)) == Thing(each.size)
        first = newer.encode((steps[0],))
        assert newer.decode(first, changes[:count]) == (each,)
        assert older.decode(first, changes[:count]) == (Thing(each.size),)


@together(
    "written",
    [
        b"",
        b"{",
        b"\xff",
        b"{}",
        b'{"c":"Thing","f":{}}',  # without a default
        b'{"c":"Thing"}',
        b'{"c":"Other","f":{}}',
        b'{"e":"Colour","v":"mauve"}',
        b'{"b":"xy"}',
        b'{"s":3}',
        b'{"c":["Thing"],"f":{}}',
        b'{"c":"Thing","f":[1]}',
    ],
)
def test_what_is_no_value_is_refused(written: bytes) -> None:
    with pytest.raises(DecodeError):
        Codec([Thing, Colour]).decode(written)


@settings(max_examples=rounds(10, 400), deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | texts,
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(["c", "f", "e", "v", "b", "s", "Fleet", "x"]), x | st.just("Fleet")
            )
        ),
    )
)
def test_nothing_but_a_decode_error_comes_of_any_json(anything: object) -> None:
    try:
        CODEC.decode(json.dumps(anything).encode())
    except DecodeError:
        pass


#: What a place of a state may have instead: of any type, and near to what the codec looks for.
ODD: tuple[object, ...] = (
    *(None, True, 0, 1, -1, 2**63, 10**400, 0.5, 1e308, float("nan"), "", "\0", "Fleet", "x" * 999),
    *([], {}, [[]] * 50, {"b": "00"}, {"b": "x"}, {"s": [1, 1]}, {"s": [[]]}, {"s": 1}),
    *({"e": "Phase", "v": "serving"}, {"e": "Phase", "v": []}, {"e": [], "v": 1}),
    *({"c": "Fleet"}, {"c": "Fleet", "f": {}}, {"c": "Fleet", "f": []}),
    {"c": "Worker", "f": {"x": 1}, "said": 1},
    *({"c": "Settings", "f": {"path": "/bin/false"}}, {"p": [], "v": 1}, {"p": [""], "at": 0}),
)  # fmt: skip


def changed(tree: Any, chance: random.Random) -> Any:
    """Return a parsed state with another value, or none, in some of its places."""
    tree = json.loads(json.dumps([tree]))
    for _ in range(chance.choice((1, 1, 3))):
        places = [*_places(tree)]
        holder, key = chance.choice(places)
        other, at = chance.choice(places)
        if chance.random() < 0.2 and holder is not tree:
            del holder[key]
        else:
            new = chance.choice((*ODD, other[at]))
            holder[key] = json.loads(json.dumps(new))  # no value is in two places
    return tree[0]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Return each place in a parsed state: what holds it, and its name or index."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


#: Audit events of what reading a state must not do; of all of them while a list is there.
_EFFECTS = ("open", "os.", "subprocess.", "socket.", "signal.", "fcntl.", "ctypes.")
_seen: list[str] | None = None


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if _seen is not None and event.startswith(_EFFECTS):
        _seen.append(f"{event} {arguments}")


@cache
def _audit() -> None:
    """Listen from here on, in this process; there is no way to end it."""
    sys.addaudithook(_note)


@contextmanager
def without_effect() -> Iterator[None]:
    """Fail if a file is opened, a program executed or a process signalled meanwhile."""
    global _seen
    _audit()
    _seen = seen = list[str]()
    try:
        yield
    finally:
        _seen = None
    assert seen == []


@settings(max_examples=SNAPSHOTS, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps(), st.integers(0, 2**32))
def test_a_state_with_other_values_is_read_or_refused_and_has_no_effect(
    steps: list[Snapshot], seed: int
) -> None:
    """Whoever changed it has made new checksums."""
    chance = random.Random(seed)
    changes = [CODEC.changes(one, other) for one, other in pairwise(steps)]
    parts = [json.loads(each) for each in (CODEC.encode(steps[0]), *filter(None, changes))]
    refused = 0
    for _ in range(rounds(50, 1000)):
        other = [*parts]
        at = chance.randrange(len(parts))
        other[at] = changed(parts[at], chance)
        with opened() as file:
            file.write(json.dumps(other[0]).encode())
            for each in other[1:]:
                file.write_change(json.dumps(each).encode())
            try:
                with without_effect():
                    assert isinstance(checkpoint.read(file.fd), Snapshot)
            except StateError:
                refused += 1
    assert refused


@together("value", [object(), [1], {"a": 1}, {1}, Thing])
def test_what_could_not_be_read_back_is_not_written(value: object) -> None:
    with pytest.raises(TypeError, match="is no part of the state"):
        Codec([]).encode(value)


# --- the file -----------------------------------------------------------------


def test_the_last_state_is_read_also_by_another_program(file: StateFile) -> None:
    assert file.empty
    for number in range(5):
        file.write(b"state %d" % number)
        assert file.read() == (b"state %d" % number,)
        assert StateFile(os.dup(file.fd)).read() == (b"state %d" % number,)
    assert not file.empty
    for fd in {int(name) for name in os.listdir("/proc/self/fd")}:
        if fd != file.fd and _is_state(fd):
            os.close(fd)


def _is_state(fd: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:sp.state")
    except FileNotFoundError:
        return False


def test_changes_are_read_after_what_they_change(file: StateFile) -> None:
    for number in range(5):
        file.write(b"state %d" % number)
        for change in range(number):
            file.write_change(b"change %d" % change)
        expected = (b"state %d" % number, *(b"change %d" % change for change in range(number)))
        assert StateFile(file.fd).read() == expected


def test_a_change_written_in_part_is_not_read_but_those_before_it(file: StateFile) -> None:
    file.write(b"the value")
    file.write_change(b"first")
    before = _content(file)
    file.write_change(b"second, of which a part is written")
    after = _content(file)
    changed = [at for at in range(len(after)) if before[at] != after[at]]

    for at in reversed(changed):
        slot, place = divmod(at, SLOT)
        os.pwrite(file.fd, before[at : at + 1], slot * state_file._SLOT_BYTES + place)
        assert StateFile(file.fd).read() == (b"the value", b"first"), at


def test_changes_as_long_as_the_value_make_way_for_a_whole_one(file: StateFile) -> None:
    assert not file.takes_changes
    file.write(b"x" * 100_000)
    written = 0
    while file.takes_changes:
        file.write_change(b"y" * 1000)
        written += 1

    assert 90 < written < 110
    file.write(b"z")
    assert file.takes_changes
    assert not StateFile(os.dup(file.fd)).takes_changes  # another program begins with all of it
    os.close(max(int(name) for name in os.listdir("/proc/self/fd") if _is_state(int(name))))


def test_an_empty_one_has_no_state(file: StateFile) -> None:
    assert checkpoint.read(file.fd) is None
    with pytest.raises(StateError, match="no whole state"):
        file.read()


class Spoilt:
    """A state file with two good states, of which the newer one can be spoilt."""

    def __init__(self, file: StateFile) -> None:
        self.file = file
        file.write(b"the one before")
        before = _content(file)
        file.write(b"the newest")
        self.content = _content(file)
        self.at = [at for at, (a, b) in enumerate(zip(before, self.content, strict=True)) if a != b]
        first = self.at[0] // SLOT * SLOT
        self.places = range(first, first + HEADER + len(b"the newest"))

    def put(self, at: int, byte: int) -> None:
        slot, place = divmod(at, SLOT)
        os.pwrite(self.file.fd, bytes([byte]), slot * state_file._SLOT_BYTES + place)

    def read(self) -> bytes:
        (whole,) = StateFile(self.file.fd).read()
        return whole


HEADER = state_file._HEADER.size + state_file._CHECKSUM.size
SLOT = HEADER + 160


def _content(file: StateFile) -> bytes:
    return b"".join(
        os.pread(file.fd, SLOT, slot * state_file._SLOT_BYTES).ljust(SLOT, b"\0") for slot in (0, 1)
    )


def test_a_state_with_any_byte_changed_is_not_read_but_the_one_before(file: StateFile) -> None:
    spoilt = Spoilt(file)
    assert spoilt.read() == b"the newest"

    for at in spoilt.places:
        for flip in (0x01, 0x80, 0xFF):
            spoilt.put(at, spoilt.content[at] ^ flip)
            assert spoilt.read() == b"the one before", f"byte {at - spoilt.places[0]}"
        spoilt.put(at, spoilt.content[at])

    assert spoilt.read() == b"the newest"


def test_a_state_written_in_part_is_not_read_but_the_one_before(file: StateFile) -> None:
    file.write(b"first")  # its place is what the third is written over
    file.write(b"the one before")
    old = _content(file)
    file.write(b"half of this is written")
    new = _content(file)
    changed = [at for at in range(len(new)) if old[at] != new[at]]
    start = changed[0] // SLOT * SLOT
    spoilt = Spoilt.__new__(Spoilt)
    spoilt.file = file

    for written in range(HEADER + len(b"half of this is written")):
        for at in range(start, start + SLOT):
            spoilt.put(at, new[at] if at < start + written else old[at])
        assert spoilt.read() == b"the one before", f"{written} bytes"


def test_after_a_spoilt_state_the_next_one_is_written_in_its_place(file: StateFile) -> None:
    spoilt = Spoilt(file)
    spoilt.put(spoilt.places[0], 0)

    again = StateFile(file.fd)
    again.write(b"the next")

    assert spoilt.read() == b"the next"
    spoilt.put(spoilt.places[0], 0)  # its header is in the same place
    assert spoilt.read() == b"the one before"


def test_when_both_are_spoilt_it_says_so(file: StateFile) -> None:
    file.write(b"only")
    os.pwrite(file.fd, b"\0", state_file._SLOT_BYTES)

    with pytest.raises(StateError, match="no whole state"):
        StateFile(file.fd).read()


def test_a_state_of_a_newer_program_is_refused_in_words(
    file: StateFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write(b"old")
    for module in ("model.codec", "system.state_file"):
        monkeypatch.setattr(f"socketprotector.{module}.FORMAT", FORMAT + 1)
    file.write(b"new")
    assert file.read() == (b"new",)
    monkeypatch.undo()

    with pytest.raises(StateError, match=r"newer version \(format 4, this one reads up to 3\)"):
        StateFile(file.fd).read()


def test_a_state_of_an_older_format_is_refused_in_words(
    file: StateFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socketprotector.system.state_file.FORMAT", 2)
    file.write(b"old")
    monkeypatch.undo()

    with pytest.raises(StateError) as refused:
        StateFile(file.fd).read()

    assert type(refused.value) is StateError, "no later program could read it"
    assert str(refused.value) == (
        "the state cannot be read: written by an older version (format 2, this one reads only 3); "
        "stop that version, then start this one"
    )


def test_what_does_not_fit_leaves_the_state_before(
    file: StateFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write(b"small")
    monkeypatch.setattr(state_file, "_SLOT_BYTES", state_file._SLOT_BYTES)
    with pytest.raises(OSError, match="does not fit"):
        file.write(bytes(state_file._SLOT_BYTES))

    assert file.read() == (b"small",)


def test_a_state_that_is_no_snapshot_is_refused(file: StateFile) -> None:
    file.write(CODEC.encode(3))

    with pytest.raises(StateError, match="no snapshot"):
        checkpoint.read(file.fd)


def test_a_state_that_cannot_be_read_is_refused_in_words(file: StateFile) -> None:
    file.write(b'{"c":"Teapot","f":{}}')

    with pytest.raises(StateError, match="this one does not know Teapot"):
        checkpoint.read(file.fd)
