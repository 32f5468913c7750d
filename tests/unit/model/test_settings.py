"""The settings on their way to the resident process, and to the next program."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from socketprotector.core.fleet import Policy
from socketprotector.model.codec import FORMAT
from socketprotector.model.handoff_modes import MODES
from socketprotector.model.log_format import FORMATS, LEVELS
from socketprotector.model.ready_kinds import KINDS
from socketprotector.model.settings import (
    LIMITS,
    Identity,
    ListenerSettings,
    Settings,
    SettingsError,
    dump,
    load,
)
from tests.rounds import rounds
from tests.together import together

#: What a name of a file or a variable can be: bytes that are no UTF-8 too.
texts = st.text(
    st.one_of(st.characters(), st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF)),
    max_size=8,
)
numbers = st.floats(allow_nan=False)
identities = st.builds(
    Identity,
    uid=st.integers(),
    gid=st.integers(),
    user=texts,
    groups=st.lists(st.integers()).map(tuple),
)
whole = st.builds(
    Settings,
    name=texts,
    command=st.lists(texts).map(tuple),
    directory=texts,
    listeners=st.lists(
        st.builds(
            ListenerSettings,
            address=texts.map("unix:{}".format),
            device=st.integers(),
            foreign=st.booleans(),
        )
    ).map(tuple),
    policy=st.builds(Policy, settle_s=numbers, start_tries=st.integers(), stop_first=st.booleans()),
    workers=st.integers(),
    ready_after_s=st.none() | numbers,
    identity=st.none() | identities,
    worker_identity=st.none() | identities,
    limits=st.lists(st.tuples(st.sampled_from(LIMITS), st.integers())).map(tuple),
    environment=st.lists(st.tuples(texts, texts)).map(tuple),
    env_file=st.none() | texts,
    log_file=st.none() | texts,
    guarded=st.booleans(),
    secret=texts,
    notices=st.lists(texts).map(tuple),
)
PLAIN = Settings(name="web", command=("./web",), directory="/srv")


@examples(max_examples=rounds(25, 1000), deadline=None, suppress_health_check=list(HealthCheck))
@given(whole)
def test_settings_come_back_as_they_were(settings: Settings) -> None:
    assert load(dump(settings)) == settings


def test_a_number_with_a_name_is_written_as_a_number() -> None:
    assert load(dump(replace(PLAIN, drain_signal=signal.SIGQUIT))).drain_signal == 3


def changed(**values: object) -> bytes:
    """Plain settings as bytes, with some of what is in them replaced."""
    written = json.loads(dump(PLAIN))
    return json.dumps({**written, "settings": {"c": "Settings", "f": _fields(**values)}}).encode()


def _fields(**values: object) -> dict[str, object]:
    fields: dict[str, object] = json.loads(dump(PLAIN))["settings"]["f"]
    return {**fields, **values}


def _policy(**values: object) -> dict[str, object]:
    return {"c": "Policy", "f": values}


@together(
    "values",
    [
        *({"ready_question": each} for each in ("accept", "http:/", "https://web:1/ok=204")),
        *({"health": each} for each in ("accept", "http:[web]/p", "check:true")),
        *({"handoff": each} for each in MODES),
        *({"ready": each} for each in KINDS),
        *({"log_level": each} for each in LEVELS),
        *({"log_format": each} for each in FORMATS),
        *({"policy": _policy(settle_check=each)} for each in ("", "check:x", "http:/", "https:/")),
        {"limits": [[name, 7] for name in LIMITS]},
    ],
)
def test_each_value_of_this_version_is_known(values: dict[str, object]) -> None:
    load(changed(**values))


def test_warnings_keep_no_older_program_from_reading_the_settings() -> None:
    """It refuses each field that it does not know, and these are for people alone."""
    warned = replace(PLAIN, warnings=("only user root can connect",))

    assert load(dump(warned)) == warned
    assert json.loads(dump(warned))["settings"]["f"] == _fields()


@together(
    ("data", "why"),
    [
        (
            b'{"format": %d, "anything": 1}' % (FORMAT + 1),
            f"the settings cannot be read: written by a newer version (format {FORMAT + 1}, this "
            f"one reads up to {FORMAT}); start that version, or stop and start afresh",
        ),
        (
            changed(teapot=1, beside={}),
            "the settings cannot be read: written by a newer version (this one does not know "
            "beside, teapot); start that version, or stop and start afresh",
        ),
        (changed(policy={"c": "Policy", "f": {"teapot_s": 1.0}}), "does not know teapot_s"),
        (changed(policy={"c": "Teapot", "f": {}}), "does not know Teapot"),
        (
            changed(handoff="pigeon"),
            "the settings cannot be read: written by a newer version (this one does not know "
            "handoff 'pigeon'); start that version, or stop and start afresh",
        ),
        (changed(ready="signal"), "does not know ready 'signal'"),
        (changed(ready_question="grpc:/"), "does not know ready_question 'grpc:/'"),
        (changed(ready_question="check:true"), "does not know ready_question 'check:true'"),
        (changed(health="ping:"), "does not know health 'ping:'"),
        (changed(limits=[["nofile", 9], ["stack", 1]]), "does not know limits [['nofile', 9], ['"),
        (changed(log_level="notice"), "does not know log_level 'notice'"),
        (changed(log_format="cbor"), "does not know log_format 'cbor'"),
        (changed(policy=_policy(ready="signal")), "does not know ready 'signal'"),
        (changed(policy=_policy(settle_check="grpc:/")), "does not know settle_check 'grpc:/'"),
        (changed(policy=_policy(settle_check="accept")), "does not know settle_check 'accept'"),
        (
            b'{"format": 2, "name": "web"}',
            "the settings cannot be read: written by an older version (format 2, this one reads "
            "only 3); stop that version, then start this one",
        ),
        (b'{"format": "x"}', "the settings cannot be read: TypeError"),
        (b'{"format": 3, "settings": 7}', "the settings cannot be read: they are int"),
        (b"{}", "the settings cannot be read: KeyError"),
        (b"[]", "the settings cannot be read: "),
        (b"", "the settings cannot be read: JSONDecodeError"),
        (b"\xff", "the settings cannot be read: UnicodeDecodeError"),
    ],
)
def test_what_it_cannot_use_is_refused_in_words(data: bytes, why: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load(data)

    assert why in str(refused.value)
