"""A control socket that answers as a test wants: docs/control.md, without a protector."""

from __future__ import annotations

import copy
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from socketprotector.system import control_path

Message = dict[str, Any]
Answer = Callable[["Connection", Message], Message | None]


def worker(number: int, pid: int = 4712, state: str = "ready", **more: Any) -> Message:
    """A worker of a status."""
    return {
        "number": number,
        "slot": 0,
        "pid": pid,
        "state": state,
        "started_at": 100.0,
        "ready_at": 101.0,
        "ready_by": "notify",
        "accepted": 60,
        "active": 1,
        "finished": 59,
        "errors": 0,
        "status": "",
        "quick_deaths": 0,
        "processes": [],
        **more,
    }


def generation(number: int, phase: str = "serving", *workers: Message, **more: Any) -> Message:
    """A generation of a status."""
    return {
        "number": number,
        "phase": phase,
        "opened_at": 100.0,
        "serving_since_at": 101.0,
        "draining_since_at": None,
        "path": "/srv/daemon",
        "release": None,
        "first_programs": None,
        "queue": 0,
        "oldest_waiting_s": None,
        "settle_check": "",
        "accepted": 120,
        "active": 3,
        "finished": 117,
        "errors": 0,
        "lost": 0,
        "wait_us": {"count": 120, "p50": 63, "p99": 1023, "buckets": [0] * 32},
        "workers": list(workers),
        **more,
    }


def listener(address: str = "tcp:0.0.0.0:4321", **more: Any) -> Message:
    """A listener of a status."""
    return {
        "index": 0,
        "address": address,
        "name": address.rpartition(":")[2],
        "backlog": 3,
        "backlog_limit": 4096,
        "reachable": True,
        **more,
    }


def reload(number: int, result: str, reason: str = "") -> Message:
    """A reload of a status, or its dry run."""
    return {
        "generation": number,
        "result": result,
        "reason": reason,
        "began_at": 150.0,
        "ended_at": None if result == "running" else 151.0,
    }


def entry(kind: str, number: int, result: str, reason: str = "", **more: Any) -> Message:
    """One of `history`."""
    return {"kind": kind, **reload(number, result, reason), **more}


def crash(**more: Any) -> Message:
    """A crash, as `crashes` answers it."""
    return {
        "at": 0.0,
        "generation": 8,
        "worker": 14,
        "slot": 0,
        "pid": 4712,
        "how": "was killed by SIGSEGV",
        "when": "serving",
        "lost": 3,
        "last_words": "one\ntwo\n",
        "cpu_s": 1.2,
        "max_rss_kib": 31000,
        **more,
    }


def owner(pid: int, **more: Any) -> Message:
    """A worker, as `connections` answers it."""
    return {
        "generation": 8,
        "worker": 14,
        "pid": pid,
        "accepted_at_by_fd": None,
        "orphaned": False,
        "since_at": 90.0,
        **more,
    }


def health(state: str, last: str = "", reason: str = "") -> Message:
    return {
        "probe": "http:/healthz",
        "state": state,
        "since_at": 140.0,
        "last": last,
        "reason": reason or (last if state == "unhealthy" else ""),
        "failures": 3 if last else 0,
        "answered_at": 199.0,
    }


def canary(stage: str = "share", **more: Any) -> Message:
    """The rollout of generation 9, as a canary."""
    return {
        "generation": 9,
        "kind": "canary",
        "stage": stage,
        "share": 5.0 if stage == "share" else 100.0,
        "met": 1230,
        "left_s": 40.2,
        "at_least": 0,
        **more,
    }


def rolling(*waits_for: Message, stage: str = "replacing", **more: Any) -> Message:
    """The rollout of generation 9, whose workers are replaced a few at a time."""
    return {
        "generation": 9,
        "kind": "rolling",
        "stage": stage,
        "share": 37.5,
        "met": 1230,
        "left_s": None,
        "replaced": 3,
        "wanted": 8,
        "waits_for": list(waits_for),
        **more,
    }


def awaited(number: int, active: int | None = None, oldest_s: float | None = None) -> Message:
    """A worker that a rollout waits for."""
    return {"worker": number, "generation": 8, "active": active, "oldest_s": oldest_s}


def status(*generations: Message, **more: Any) -> Message:
    """A status; one serving generation unless others are given."""
    there = list(generations) or [generation(8, "serving", worker(14))]
    return {
        "name": "web",
        "pid": os.getpid(),
        "main_pid": os.getpid(),
        "version": "0.9.0",
        "started_at": 50.0,
        "now": 200.0,
        "restarts": 0,
        "phase": "serving",
        "held_s": None,
        "lame_duck": "off",
        "lame_duck_s": None,
        "guarded": False,
        "handoff": "connection",
        "control": "/run/x",
        "ready": "notify",
        "health": None,
        "command": ["./daemon"],
        "log_level": "info",
        "workers_wanted": 1,
        "route": next((g["number"] for g in there if g["phase"] == "serving"), None),
        "forwarded": 12345,
        "lost": 0,
        "queue_limit": 278,
        "reload_wanted": False,
        "listeners": [listener()],
        "generations": there,
        "dry_run": None,
        "reloads": [],
        "crashes": 0,
        "warnings": [],
        **more,
    }


class Refusing(Exception):
    """What an answer raises to say no."""

    def __init__(self, code: str, error: str) -> None:
        super().__init__(error)
        self.code = code


class Connection:
    """One client; what it asked for is kept in the server."""

    def __init__(self, server: Fake, sock: socket.socket) -> None:
        self._server = server
        self.socket = sock
        self.follows = False

    def serve(self) -> None:
        try:
            with self.socket, self.socket.makefile("rb") as lines:
                for line in lines:
                    self._answer(json.loads(line))
        except (OSError, ValueError):
            pass
        finally:
            self._server.forget(self)

    def _answer(self, asked: Message) -> None:
        answer: Message = {"v": 1, "id": asked.get("id")}
        try:
            result = self._server.answer(self, asked)
        except Refusing as error:
            self.send({**answer, "ok": False, "code": error.code, "error": str(error)})
            return
        if result is not None:
            self.send({**answer, "ok": True, "result": result})

    def send(self, message: Message) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def event(self, name: str, **fields: Any) -> None:
        self.send({"v": 1, "event": name, "at": time.time(), "level": "info", **fields})

    def cut(self) -> None:
        """End the connection, as an upgrade does."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


class Fake:
    """Listens at a path; `answers` says what each command gets."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.status = status(name=control_path.key(str(path)))
        self.answers: dict[str, Answer] = {
            "status": lambda _, __: copy.deepcopy(self.status),
            "events": self._events,
        }
        self.asked: list[Message] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._connections: set[Connection] = set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            connection = Connection(self, sock)
            self._connections.add(connection)
            thread = threading.Thread(target=connection.serve)
            self._threads.append(thread)
            thread.start()

    def answer(self, connection: Connection, asked: Message) -> Message | None:
        self.asked.append({k: v for k, v in asked.items() if k not in ("v", "id")})
        answer = self.answers.get(asked["command"])
        if answer is None:
            raise Refusing("unknown", f"unknown command {asked['command']!r}")
        return answer(connection, asked)

    def commands(self) -> list[str]:
        """The names of what was asked, in order."""
        return [each["command"] for each in list(self.asked)]

    @staticmethod
    def _events(connection: Connection, _: Message) -> Message:
        connection.follows = True
        return {}

    def following(self) -> list[Connection]:
        """Clients that follow events."""
        return [each for each in list(self._connections) if each.follows]

    def forget(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def cut_all(self) -> None:
        """End all connections."""
        for each in list(self._connections):
            each.cut()

    def end(self) -> None:
        """Be gone, and leave the socket file."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._threads[0].join()
        self._listener.close()
        self.cut_all()
        for each in self._threads[1:]:
            each.join()


#: What a false instance answers instead of its status.
MALFORMED = (
    b"[" * 200_000,
    b'{"name":"a\\ud800b","phase":"serving","route":1}',
    b'{"name":"bad","phase":"serving","now":1e999,"route":1,"started_at":' + b"9" * 400 + b"}",
)


def malformed(fake: Fake, result: bytes) -> None:
    """Let a fake answer its status with these bytes."""

    def answer(connection: Connection, asked: Message) -> None:
        head = json.dumps(asked["id"]).encode()
        connection.socket.sendall(b'{"v":1,"id":%b,"ok":true,"result":%b}\n' % (head, result))

    fake.answers["status"] = answer
