"""A UNIX listener and the model of its path: a sample of sequences against the real kernel."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

from socketprotector.launch.bind_unix import give_away
from socketprotector.model.settings import ListenerSettings
from socketprotector.system import path_group, socket_file
from socketprotector.system.path_group import OTHER, RESERVE, PathGroup
from socketprotector.system.unix_listener import UnixListener
from tests.unit.system.path_group_model import EVENTS, World

SEQUENCES = 60
LENGTH = 8
#: Those need a file system that fails, or other processes that end.
OMITTED = {"shut current, full", "route, full", "start again", "all killed"}
PICKED = sorted(EVENTS.keys() - OMITTED)


class Twin(World):
    """A model, and a listener to which the same happens."""

    listener: UnixListener | None = None

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = str(folder / "s")
        made = [
            socket_file.bind(self.path, 16, socket_file.Rights(-1, -1, 0o600), give_away)
            for _ in "12"
        ]
        socket_file.lead_to(self.path, made[0], made)
        found = os.lstat(self.path)
        address = f"unix:{self.path}"
        self.settings = ListenerSettings(address, found.st_dev, found.st_ino, 16, beside=True)
        first, second = (each.detach() for each in made)
        self.listener = UnixListener(first, 0, self.settings, shared=True, sibling=second)
        self.listener.file_rights = socket_file.Rights(-1, -1, 0o600)  # as after the first steering
        self.clients: list[socket.socket] = []
        self.foreign: list[socket.socket] = []
        self.kept: dict[int, socket.socket] = {}  # the guard's
        self.workers_have = {0: self.listener.socket.dup()}
        self.record()

    # -- what we do ----------------------------------------------------------------------

    def look(self, *, everything: bool = False) -> PathGroup:
        group = super().look(everything=everything)
        if self.listener is not None and not everything:
            real = self.listener._examine()
            same = ("members", "leads_to", "own", "waiting")
            differing = [each for each in same if getattr(real, each) != getattr(group, each)]
            assert not differing, f"{differing}: {group} and really {real}"
            assert len(real.leftovers) == len(group.leftovers)
        return group

    def carry_out(self, plan: path_group.Plan) -> None:
        if self.listener is not None:
            named = {each for each in plan if isinstance(each, path_group.RemoveLeftover)}
            ours = [each for each in plan if each not in named]
            left = self.listener._examine().leftovers if named else ()
            self.listener._carry_out((*ours, *map(path_group.RemoveLeftover, left)))
        super().carry_out(plan)

    def record(self) -> None:
        super().record()
        if self.listener is not None:
            for each in self.kept.values():
                each.close()
            self.kept = {n: each.dup() for n, each in self.listener._members().items()}

    def open(self) -> None:
        before = self.starting
        super().open()
        if self.starting is not None and before is None:
            assert self.listener is not None
            self.workers_have[self.starting] = self.listener.socket_for(self.starting).dup()

    def end(self) -> None:
        number = self.starting if self.starting is not None else 1 - self.current
        if number in self.workers_have:
            if self.starting is None:
                self.accept_all(self.workers_have[number])
            self.workers_have.pop(number).close()
        super().end()

    def drop(self, number: int) -> None:
        assert self.listener is not None
        was_pair = self.is_pair
        super().drop(number)
        if was_pair:
            self.listener.drop_socket(number)

    def restart(self) -> None:
        assert self.listener is not None
        for each in self.listener._members().values():
            each.close()
        fds = {n: each.dup().detach() for n, each in self.kept.items()}
        self.members = dict(self.recorded)
        self.listener = UnixListener(
            fds[0],
            0,
            self.settings,
            shared=True,
            sibling=fds.get(1, -1),
            reserved=fds.get(RESERVE, -1),
        )
        self.listener.file_rights = socket_file.Rights(-1, -1, 0o600)
        super().restart()

    # -- what others do --------------------------------------------------------------------

    def shut(self, one: int) -> None:
        assert self.listener is not None
        number = next(n for n, each in self.members.items() if each == one)
        self.listener._members()[number].shutdown(socket.SHUT_RDWR)
        super().shut(one)

    def client(self, name: str = "path") -> None:
        super().client(name)
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            if client.connect_ex(self.real(name)) == 0:
                self.clients.append(client.dup())

    def real(self, name: str) -> str:
        if name == "path":
            return self.path
        assert self.listener is not None
        number = next(n for n, one in self.members.items() if self.files.own(one) == name)
        return socket_file.own_file(self.path, self.listener._members()[number])

    def accept(self) -> None:
        super().accept()
        for each in self.workers_have.values():
            self.accept_all(each)

    def accept_all(self, one: socket.socket) -> None:
        one.setblocking(False)
        while True:
            try:
                one.accept()[0].close()
            except OSError:
                return

    def lose_path(self) -> None:
        super().lose_path()
        Path(self.path).unlink(missing_ok=True)

    def lose_files(self) -> None:
        for each in Path(self.path).parent.iterdir():
            each.unlink()
        super().lose_files()

    def lose_file(self, number: int) -> None:
        Path(self.real(self.files.own(self.members[self.number(number)]))).unlink(missing_ok=True)
        super().lose_file(number)

    def replace_path(self) -> None:
        had = self.look().leads_to == OTHER
        super().replace_path()
        if not had:
            Path(self.path).unlink(missing_ok=True)
            self.foreign.append(socket.socket(socket.AF_UNIX))
            self.foreign[-1].bind(self.path)

    def close(self) -> None:
        assert self.listener is not None
        self.listener.close()
        having = (self.kept.values(), self.workers_have.values(), self.clients, self.foreign)
        for each in (one for several in having for one in several):
            each.close()


def test_the_kernel_does_as_its_model(tmp_path: Path) -> None:
    """Nothing but another program's file is left at the end."""
    for seed in range(SEQUENCES):
        pick, so_far = random.Random(seed), []
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        twin = Twin(folder)
        try:
            for _ in range(LENGTH):
                so_far.append(pick.choice(PICKED))
                twin.happens(so_far[-1])
            twin.look()
            is_foreign = twin.look().leads_to == OTHER
        except Exception as error:
            raise AssertionError(f"{so_far}: {error}") from error
        finally:
            twin.close()
        left = [each.name for each in folder.iterdir()]
        assert left == (["s"] if is_foreign else []), so_far
