"""The program as Prometheus meets it: over HTTP and HTTPS; instances come, go and hang."""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

import pytest
from prometheus_client.core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from socketprotector_exporter import collector
from socketprotector_exporter.collector import ProtectorCollector, labels
from socketprotector_exporter.main import _command
from socketprotector_exporter.token_file import read_token

from socketprotector.ctl.query_all import SocketAnswer
from socketprotector.model.errors import UsageError
from tests import forked
from tests.pages import page
from tests.running import DEADLINE_S, ROOT, Ended, Lines
from tests.together import together
from tests.unit.ctl.fake import MALFORMED, Fake, health, listener, malformed, status
from tests.unit.exporter.conftest import COMMAND, Exporter, run

Start = Callable[..., Exporter]
Values = dict[tuple[str, str], float]


def get(
    address: str,
    accept: str = "text/plain",
    tls: ssl.SSLContext | None = None,
    authorization: str = "",
) -> tuple[int, str, str]:
    """Return status, content type and body."""
    headers = {"Accept": accept, "Authorization": authorization}
    request = urllib.request.Request(address, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S, context=tls) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def scraped(exporter: Exporter) -> Values:
    """Metric and instance -> value, of those without other labels."""
    code, _, body = get(f"{exporter.address}/metrics")
    assert code == 200
    families: Iterable[Metric] = text_string_to_metric_families(body)
    return {
        (sample.name, sample.labels["instance"]): sample.value
        for family in families
        for sample in family.samples
        if sample.labels.keys() == {"instance"}
    }


def test_a_malformed_status_hides_no_other_instance(
    exporter: Start, fakes: Callable[[str], Fake]
) -> None:
    good, bad = fakes("good"), fakes("bad")
    one = exporter("--control", good.path, "--control", bad.path)
    for result in MALFORMED:
        malformed(bad, result)
        values = scraped(one)
        assert values["socketprotector_up", "good"] == 1
        assert values["socketprotector_connections_active", "good"] == 3
        assert len([name for name in values if name[0] == "socketprotector_up"]) == 2
        assert "good" not in get(f"{one.address}/readyz")[2]
        assert get(f"{one.address}/readyz/good")[0] == 200


def test_no_name_is_another_ones_path_or_cannot_be_encoded() -> None:
    odd = os.fsdecode(b"/run/x/\xff.control")
    paths = ["/run/a", "/run/b", "/run/c", odd]
    names = ["web", "web", "/run/a", ""]
    found = [SocketAnswer(path, {"name": name}) for path, name in zip(paths, names, strict=True)]

    assert labels(found) == ["/run/a", "/run/b", "/run/c", "\\xff"]


def test_a_scrape_has_every_instance(exporter: Start, fakes: Callable[[str], Fake]) -> None:
    fakes("web")
    fakes("shop").status["forwarded"] = 7
    values = scraped(exporter())

    assert values["socketprotector_up", "web"] == 1
    assert values["socketprotector_connections_accepted_total", "web"] == 12345
    assert values["socketprotector_connections_accepted_total", "shop"] == 7


def test_openmetrics_is_spoken_to_clients_that_ask_for_it(
    exporter: Start, fakes: Callable[[str], Fake]
) -> None:
    fakes("web")
    code, kind, body = get(f"{exporter().address}/metrics", "application/openmetrics-text")

    assert code == 200
    assert kind.startswith("application/openmetrics-text")
    parse: Callable[[str], Iterable[Metric]] = openmetrics.text_string_to_metric_families
    families = {each.name: each for each in parse(body)}
    assert families["socketprotector_connections_accepted"].type == "counter"
    assert families["socketprotector_wait_seconds"].type == "histogram"
    assert families["socketprotector_build"].type == "info"


def test_who_asks_for_an_odd_format_gets_plain_text(
    exporter: Start, fakes: Callable[[str], Fake]
) -> None:
    fakes("web")
    one = exporter()
    for odd in ('version="a.b"', 'version="a.b";escaping=zzz', "version=1.é", "escaping", "=;=,;"):
        code, kind, body = get(f"{one.address}/metrics", f"application/openmetrics-text;{odd}")

        assert (code, "text" in kind) == (200, True), odd
        # On a busy machine the status may come too late; the value is not of the format.
        assert 'socketprotector_up{instance="web"} ' in body
    assert one.end() == 0
    assert len(one.said.seen) == 1


def test_an_instance_that_is_dead_or_hangs_is_down_and_the_others_are_up(
    exporter: Start, fakes: Callable[[str], Fake], runtime: Path
) -> None:
    fakes("web")
    fakes("dead").end()
    released = threading.Event()
    slow = fakes("slow")
    slow.answers["status"] = lambda _, __: {} if released.wait(DEADLINE_S) else None
    with socket.socket(socket.AF_UNIX) as unaccepting:
        unaccepting.bind(str(runtime / "stopped.control"))
        unaccepting.listen(0)
        one = exporter("--name", "web", "--name", "dead", "--name", "slow", "--name", "stopped",
                       "--name", "missing")  # fmt: skip
        values = scraped(one)
        code, _, unready = get(f"{one.address}/readyz")
    released.set()

    ups = {name: values["socketprotector_up", name] for name in
           ("web", "dead", "slow", "stopped", "missing")}  # fmt: skip
    assert ups == {"web": 1, "dead": 0, "slow": 0, "stopped": 0, "missing": 0}
    assert values["socketprotector_connections_accepted_total", "web"] == 12345
    assert ("socketprotector_connections_accepted_total", "dead") not in values
    assert code == 503
    assert unready.splitlines() == [
        "dead: dead", "slow: silent", "stopped: silent", "missing: there is no control socket"
    ]  # fmt: skip


def test_ready_means_that_every_instance_serves(
    exporter: Start, fakes: Callable[[str], Fake]
) -> None:
    one = exporter("--name", "web", "--name", "shop")
    web = fakes("web")
    shop = fakes("shop")
    assert get(f"{one.address}/readyz")[::2] == (200, "ok\n")

    shop.status = status(route=None, phase="starting")
    assert get(f"{one.address}/readyz")[::2] == (503, "shop: starting\n")
    shop.status = status(held_s=3.5)
    assert get(f"{one.address}/readyz")[::2] == (200, "ok\n"), "a hold of all is no outage"
    shop.status = status(lame_duck="on")
    assert get(f"{one.address}/readyz")[::2] == (503, "shop: lame duck\n")
    shop.status = status(lame_duck="stopping", phase="stopping")
    assert get(f"{one.address}/readyz")[::2] == (503, "shop: lame duck\n")
    shop.status = status(phase="reloading")
    web.status = status(phase="stopping")
    assert get(f"{one.address}/readyz")[::2] == (503, "web: stopping\n")
    assert get(f"{one.address}/healthz")[::2] == (200, "ok\n"), "the exporter itself"


@pytest.mark.parametrize("chosen", ["all", "name", "control"])
def test_one_instance_is_ready_whatever_the_others_are(
    chosen: str, exporter: Start, fakes: Callable[[str], Fake]
) -> None:
    web, shop = fakes("web"), fakes("shop")
    web.status = status(name="web")
    shop.status = status(name="shop", lame_duck="on")
    words: dict[str, tuple[str | Path, ...]] = {
        "all": (),
        "name": ("--name", "web", "--name", "shop"),
        "control": ("--control", web.path, "--control", shop.path),
    }
    one = exporter(*words[chosen])

    assert get(f"{one.address}/readyz/web")[::2] == (200, "ok\n")
    assert get(f"{one.address}/readyz/web?from=haproxy")[0] == 200
    assert get(f"{one.address}/readyz/shop")[::2] == (503, "shop: lame duck\n")
    assert get(f"{one.address}/readyz/a%20b")[::2] == (503, "a b: there is no control socket\n")
    assert get(f"{one.address}/readyz/%1b[2J%0aok")[2].startswith(r"\x1b[2J\nok: ")
    assert get(f"{one.address}/readyz/")[0] == 404
    assert get(f"{one.address}/readyzweb")[0] == 404


def test_a_bad_answer_to_health_is_told_and_counts_where_it_is_asked_for(
    exporter: Start, fakes: Callable[[str], Fake]
) -> None:
    why = 'GET /healthz: 500, "database gone"'
    fakes("web").status = status(health=health("unhealthy", why))
    fakes("shop").status = status(health=health("healthy"), name="shop")
    fakes("new").status = status(health=health("unknown"), name="new")
    one = exporter("--name", "web", "--name", "shop", "--name", "new")
    told = f"web: unhealthy: {why}\n"

    assert get(f"{one.address}/readyz")[::2] == (200, told)
    assert get(f"{one.address}/readyz/web")[::2] == (200, told)
    assert get(f"{one.address}/readyz/web?health")[::2] == (503, told)
    assert get(f"{one.address}/readyz?a=b&health")[::2] == (503, told)
    assert get(f"{one.address}/readyz/shop?health")[::2] == (200, "ok\n")
    assert get(f"{one.address}/readyz/new?health")[::2] == (200, "ok\n")
    values = scraped(one)
    found = {name: values.get(("socketprotector_healthy", name)) for name in ("web", "shop", "new")}
    assert found == {"web": 0, "shop": 1, "new": None}
    assert values["socketprotector_health_failures", "web"] == 3


def test_one_instance_does_not_wait_for_another_that_hangs(
    exporter: Start, fakes: Callable[[str], Fake]
) -> None:
    fakes("web")
    asked = threading.Event()
    fakes("slow").answers["status"] = lambda _, __: asked.set()
    one = exporter()

    assert get(f"{one.address}/readyz/web")[::2] == (200, "ok\n")
    assert not asked.is_set()


def test_where_no_protector_is_found_it_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socketprotector.ctl.discovery.sockets", list)

    assert ProtectorCollector().unready() == (["no protector has a control socket"], [])


def test_counts_go_on_over_scrapes(exporter: Start, fakes: Callable[[str], Fake]) -> None:
    web = fakes("web")
    one = exporter("--control", web.path)
    assert scraped(one)["socketprotector_connections_taken_total", "web"] == 120
    web.status = status(generations=[])

    assert scraped(one)["socketprotector_connections_taken_total", "web"] == 120


def test_two_sockets_of_one_name_are_told_apart(
    exporter: Start, fakes: Callable[[str], Fake], tmp_path: Path
) -> None:
    first = fakes("web")
    second = Fake(tmp_path / "other" / "web.control")
    try:
        values = scraped(exporter("--control", first.path, "--control", second.path))
    finally:
        second.end()

    ups = {instance for name, instance in values if name == "socketprotector_up"}
    assert ups == {str(first.path), str(second.path)}


@pytest.mark.parametrize("odd", [(), ("--name", os.fsdecode(b"\xff"))])
def test_a_given_name_is_the_label_of_one_instance_and_can_be_encoded(
    exporter: Start, fakes: Callable[[str], Fake], odd: tuple[str, ...]
) -> None:
    web = fakes("web")

    values = scraped(exporter("--name", "web", *odd, "--control", web.path))

    ups = {instance for name, instance in values if name == "socketprotector_up"}
    assert ups == {"web", str(web.path), *(["\\xff"] if odd else [])}


def test_an_instance_is_called_by_its_name_and_its_listener_where_two_have_one(
    exporter: Start, fakes: Callable[[str], Fake]
) -> None:
    fakes("8000").status.update(name="shop")  # as an older protector's socket was called
    for key, port in (("web", 80), ("web:81", 81)):
        fakes(key).status.update(name="web", listeners=[listener(f"tcp:0.0.0.0:{port}")])

    values = scraped(exporter())

    ups = {instance for name, instance in values if name == "socketprotector_up"}
    assert ups >= {"shop", "web:80", "web:81"}  # others may run on this machine


def test_what_is_missing_is_reported_in_one_line(exporter: Start) -> None:
    code, kind, body = get(f"{exporter().address}/elsewhere")

    assert (code, body) == (404, "not here; there is /metrics, /healthz, /readyz, /readyz/NAME\n")
    assert kind.startswith("text/plain")


def test_clients_that_say_nothing_hold_no_other_client_up(
    exporter: Start, fakes: Callable[[str], Fake]
) -> None:
    fakes("web")
    one = exporter()
    port = int(one.address.rpartition(":")[2])
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]
    try:
        assert scraped(one)["socketprotector_up", "web"] == 1
    finally:
        for each in silent:
            each.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_it_is_told_to(exporter: Start, number: signal.Signals) -> None:
    one = exporter()
    assert one.address
    one.process.send_signal(number)

    assert one.process.wait(DEADLINE_S) == 0
    one.said.join()
    assert len(one.said.seen) == 1


_IS_IMPORTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "socketprotector_exporter.main":
            os.kill(os.getpid(), signal.SIGTERM)

from socketprotector_exporter.__main__ import main
sys.meta_path.insert(0, Finder())
sys.exit(main(["--listen", "127.0.0.1:0"]))
"""


def ended_in(program: str, *words: str) -> Ended:
    """The end of a program that ends itself."""
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_during_its_imports_ends_it(ignored: bool) -> None:
    """Ignored: as in a container, where the kernel drops what process 1 does not handle."""
    begin = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if ignored else ""

    ended = ended_in(begin + _IS_IMPORTED)

    assert ended.status == 0
    assert "Traceback" not in ended.err


_MAKES_ITS_FILE = """
import os, signal, sys
from socketprotector_exporter import main, web
bind = web._bind_unix

def bound(address):
    try:
        return bind(address)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)

web._bind_unix = bound
sys.exit(main.main(["--listen", "127.0.0.1:0", "--web", sys.argv[1]]))
"""


def test_a_signal_while_it_makes_the_page_s_file_leaves_no_file(tmp_path: Path) -> None:
    ended = ended_in(_MAKES_ITS_FILE, str(tmp_path / "page"))

    assert ended.status == 0
    assert "Traceback" not in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_it_cannot_remove_is_reported(exporter: Start, tmp_path: Path) -> None:
    path = tmp_path / "page"
    one = exporter("--web", path)
    assert one.page
    assert one.address
    path.unlink()
    path.mkdir()

    assert one.end() == 0
    assert one.said.seen[-1].startswith(f"socketprotector-exporter: cannot remove {path}: ")


def test_without_a_thread_it_says_so_in_one_line() -> None:
    ended = ended_in(
        "import sys, threading\n"
        "from socketprotector_exporter.main import main\n"
        "def start(_):\n"
        '    raise RuntimeError("can\'t start new thread")\n'
        "threading.Thread.start = start\n"
        "sys.exit(main(['--listen', '127.0.0.1:0']))\n"
    )

    assert ended.status == 111
    [line] = ended.err.splitlines()
    assert line.startswith("socketprotector-exporter: can't start new thread: raise the limit")


_IN_A_CALLBACK = """
import os, signal, sys, weakref
from socketprotector_exporter.bounded import BoundedServer
from socketprotector_exporter.main import main

class Watched:
    pass

def stop_in_a_callback(*_):
    watched = Watched()
    kept = weakref.ref(watched, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    del watched
    return False

BoundedServer.verify_request = stop_in_a_callback
sys.exit(main(["--listen", "127.0.0.1:0"]))
"""


def test_it_ends_when_the_signal_interrupts_the_callback_of_a_weak_reference() -> None:
    receive, send = os.pipe()
    with subprocess.Popen([sys.executable, "-c", _IN_A_CALLBACK], stderr=send) as process:
        os.close(send)
        said = Lines(receive)
        try:
            where = re.search(r"http://([\d.]+):(\d+)/", said.wait_for("serves metrics at"))
            assert where
            with socket.create_connection((where[1], int(where[2]))):
                assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
            said.join()
    assert len(said.seen) == 1


# -- TLS ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def test_it_speaks_tls(
    exporter: Start, fakes: Callable[[str], Fake], certificate: tuple[Path, Path]
) -> None:
    fakes("web")
    cert, key = certificate
    one = exporter("--tls-cert", cert, "--tls-key", key)
    assert one.address.startswith("https://")
    port = int(one.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)):  # a client that never does a TLS handshake
        trusting = ssl.create_default_context(cafile=str(cert))
        code, _, body = get(f"{one.address}/metrics", tls=trusting)
    assert code == 200
    assert 'socketprotector_up{instance="web"} 1.0' in body

    with socket.create_connection(("127.0.0.1", port)) as plain:
        plain.settimeout(DEADLINE_S)
        plain.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        try:
            assert b"socketprotector" not in plain.recv(4096)
        except ConnectionResetError:
            pass  # not even an alert
    assert get(f"{one.address}/healthz", tls=trusting)[0] == 200


def test_a_token_is_wanted_for_metrics_and_may_change(
    exporter: Start,
    fakes: Callable[[str], Fake],
    certificate: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    fakes("web")
    cert, key = certificate
    token = tmp_path / "token"
    token.touch(0o640)
    token.write_text("old\n")
    chosen = ("--name", "web", "--tls-cert", cert, "--tls-key", key, "--token", token)
    address = exporter(*chosen).address
    trusting = ssl.create_default_context(cafile=str(cert))

    def ask(page: str, authorization: str = "") -> tuple[int, str]:
        code, _, body = get(f"{address}{page}", tls=trusting, authorization=authorization)
        return code, body

    refused = (401, "give the token\n")
    for wrong in (
        "",
        "Bearer",
        "Bearer new",
        "bearer old",
        "Basic old",
        "Bearer old x",
        "Bearer é",
    ):
        assert ask("/metrics", wrong) == refused, wrong
    assert 'socketprotector_up{instance="web"} 1.0' in ask("/metrics", "Bearer old")[1]
    # What balancers ask has no more in it than before, and they have no token.
    assert ask("/healthz") == ask("/readyz") == ask("/readyz/web") == (200, "ok\n")

    token.write_text("new")
    assert ask("/metrics", "Bearer old") == refused
    assert ask("/metrics", "Bearer new")[0] == 200
    token.unlink()
    assert ask("/metrics", "Bearer new")[0] == 503


@together(
    ("content", "mode", "wanted"),
    [
        ("s3cret", 0o644, "every user may open it; chmod o= "),
        ("", 0o600, "no token; write one word there"),
        ("two words", 0o600, "no token; write one word there"),
        ("\x1b[2J", 0o600, "no token; write one word there"),
        (None, 0o600, "No such file or directory"),
    ],
)
def test_a_file_without_a_token_is_refused(
    tmp_path: Path, content: str | None, mode: int, wanted: str
) -> None:
    file = tmp_path / "token"
    file.unlink(missing_ok=True)
    if content is not None:
        file.touch(mode)
        file.write_text(content)

    with pytest.raises(UsageError) as refused:
        read_token("--token", str(file))

    assert str(refused.value).startswith(f"--token {file}: {wanted}")
    assert "s3cret" not in str(refused.value)


@together("kind", ["FIFO", "terminal"])
def test_a_token_is_in_a_file_that_can_be_read_again(kind: str) -> None:
    with TemporaryDirectory() as folder, ExitStack() as opened:
        token = Path(folder, "token")
        if kind == "FIFO":
            os.mkfifo(token, 0o600)
        else:
            ours, theirs = pty.openpty()
            opened.callback(os.close, ours)
            opened.callback(os.close, theirs)
            token.symlink_to(os.ttyname(theirs))

        with pytest.raises(UsageError, match="token: not a regular file; the exporter must be"):
            read_token("--token", str(token))


@together(
    ("arguments", "words"),
    [
        (["--listen", "0.0.0.0:0", "--token", "/t"], "others could read the token on its way"),
        (["--token", "/nowhere"], "--token /nowhere: No such file"),
        (["--all", "--name", "x"], "leave out --all, or the others"),
        (["--name", "a/b"], "a name, not a path"),
        (["--listen", "9517"], "write HOST:PORT"),
        (["--listen", "127.0.0.1:99999"], "write HOST:PORT"),
        (["--listen", "192.0.2.1:0"], "--listen 192.0.2.1:0: "),
        (["--agent", "9518"], "--agent 9518: write HOST:PORT"),
        (["--listen", "127.0.0.1:0", "--agent", "192.0.2.1:0"], "--agent 192.0.2.1:0: "),
        (["--tls-key", "k"], "add --tls-cert FILE"),
        (["--tls-cert", "/nowhere"], "--tls-cert /nowhere: No such file"),
        (["--tls-cert", __file__], "not a PEM certificate with its own key"),
        (["--tls-cert", "/dev/zero"], "--tls-cert /dev/zero: no regular file"),
        (["--nonsense"], "see --help"),
        (["extra"], "see --help"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str) -> None:
    ended = run(*arguments)

    assert ended.status in (2, 111)
    assert ended.out == ""
    assert len(ended.lines) == 1
    assert ended.err.startswith("socketprotector-exporter: ")
    assert words in ended.err


@together(("words", "extra"), [((), "exporter"), (("--web", "127.0.0.1:0"), "web")])
def test_without_prometheus_client_it_says_what_to_install(
    words: tuple[str, ...], extra: str
) -> None:
    program = (
        f"import sys; sys.modules['prometheus_client'] = None; sys.argv[1:] = {words};"
        "from socketprotector_exporter.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.returncode == 2
    assert done.stderr == (
        "socketprotector-exporter: prometheus-client is not installed; "
        f"pip install 'socketprotector[{extra}]'\n"
    )


def test_an_instance_that_this_user_may_not_ask_is_named_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whys = {"/run/a/control": "denied", "/run/b/control": "silent"}

    def answers(paths: Sequence[str], **_: object) -> list[SocketAnswer]:
        return [SocketAnswer(path, why=whys[path]) for path in paths]

    monkeypatch.setattr(collector, "query_all", answers)
    asked = ProtectorCollector(paths=list(whys))
    asked.collect()
    asked.unready()
    [line] = capsys.readouterr().err.splitlines()
    assert "/run/a/control: permission denied" in line
    assert "--status-group" in line

    whys["/run/a/control"] = "silent"
    asked.collect()
    whys["/run/a/control"] = "denied"
    asked.collect()
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture
def unread() -> Iterator[TextIO]:
    """A pipe whose reader has exited."""
    receive, send = os.pipe()
    os.close(receive)
    with suppress(BrokenPipeError), open(send, "w") as unread:
        yield unread


def test_a_line_that_nobody_reads_fails_no_scrape(
    monkeypatch: pytest.MonkeyPatch, unread: TextIO
) -> None:
    monkeypatch.setattr(
        collector, "query_all", lambda paths, **_: [SocketAnswer(paths[0], why="denied")]
    )
    asked = ProtectorCollector(paths=["/run/a/control"])
    monkeypatch.setattr(sys, "stderr", unread)

    assert asked.collect()


def test_a_line_that_nobody_reads_does_not_change_the_exit_status(unread: TextIO) -> None:
    with forked.popen([*COMMAND, "--name", "/"], stderr=unread) as process:
        assert process.wait(DEADLINE_S) == 2


def test_the_drop_ins_of_the_documents_have_options_that_there_are() -> None:
    blocks = page.blocks(ROOT / "docs" / "fleet.md")
    drop_ins = [each.text for each in blocks if "exporter.service.d" in str(each.file)]
    options = {option for each in _command.params for option in each.opts}

    assert len(drop_ins) == 2
    for text in drop_ins:
        [line] = re.findall(r"^ExecStart=(.+(?:\\\n.+)*)$", text, re.MULTILINE)
        assert set(re.findall(r" (--[\w-]+)", line)) <= options
