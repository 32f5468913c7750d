"""What an open generation takes from a record, its own or an older program's."""

from __future__ import annotations

from socketprotector.core.snapshot import CODEC
from socketprotector.daemon.generation import OpenGeneration
from socketprotector.model.records import Counts, GenerationRecord, Program

PROGRAM = Program("/w", ("w",), "/", (), 0, (), 0, listeners="tcp:127.0.0.1:80 - unix:/s")


def test_which_listeners_it_knows_is_in_its_record() -> None:
    made = OpenGeneration.make(1, PROGRAM)
    made.forget_board()

    assert made.record.knows == frozenset({0, 2})
    assert [made.knows(index) for index in range(4)] == [True, False, True, False]
    assert CODEC.decode(CODEC.encode(made.record)) == made.record


def test_a_record_of_an_older_program_gets_the_listeners_that_its_program_names() -> None:
    adopted = OpenGeneration.adopt(GenerationRecord(1, PROGRAM), None)

    assert adopted.record.knows == frozenset({0, 2})


def test_the_clients_of_an_older_program_s_canary_do_not_become_probes() -> None:
    begun = GenerationRecord(2, PROGRAM, serving_since=1.0, past=Counts(accepted=20))
    adopted = OpenGeneration.adopt(begun, None)

    adopted.begin_share()

    assert adopted.met == 20


def test_the_accept_tags_of_an_older_program_are_read_by_their_old_name() -> None:
    record = GenerationRecord(1, PROGRAM, accept_tags=((0, 3),))
    written = CODEC.encode(record).replace(b'"accept_tags"', b'"marks"')

    assert CODEC.decode(written) == record
