r"""A package's life in a system of its own: installed, used, upgraded, removed, purged.

    unshare --mount --net --pid --fork --mount-proc \
        python -m tests.packages.life MANAGER ROOT FOLDER

MANAGER is deb, rpm or pacman; systemd: deb, where a stand-in for systemctl notes what it is told;
unattended: deb, upgraded by unattended-upgrades beside needrestart, which ROOT has then.
On the standard library alone.  ROOT is a Debian with what the package depends on; nothing is
written into it.  FOLDER has the packages, a folder each: `good`, `next`; of deb `after` and
`broken`, too.  Says each step; fails with a traceback.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.packages.debs import COMPLETED
from tests.steady import Steady

MOUNT = Path("/mnt")
UPPER = MOUNT / "upper"
ROOT = MOUNT / "root"
PORT = 4321
#: What is removed together: the exporter needs the first one.
EXPORTER, CLIENT = "socketprotector-exporter", "python3-socketprotector-client"
INIT = "/etc/init.d/socketprotector"
UPGRADE = "/usr/lib/socketprotector/upgrade-running"
SETTINGS = """\
SOCKETPROTECTOR_LISTEN="127.0.0.1:{port}"
SOCKETPROTECTOR_COMMAND="/usr/bin/SampleClient {port}"
SOCKETPROTECTOR_USER=nobody
SOCKETPROTECTOR_OPTIONS="--log-file /var/log/socketprotector/{name}.log --workers 2"
"""


def mount(root: Path) -> None:
    """Put a layer over the system, which goes with the namespace, and whatever it needs."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", MOUNT], check=True)
    for each in (UPPER, MOUNT / "work", ROOT):
        each.mkdir()
    layers = f"lowerdir={root},upperdir={UPPER},workdir={MOUNT / 'work'}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, ROOT], check=True)
    subprocess.run(["mount", "-t", "proc", "proc", ROOT / "proc"], check=True)
    for kind, folder in (("tmpfs", "run"), ("tmpfs", "tmp")):
        subprocess.run(["mount", "-t", kind, "none", ROOT / folder], check=True)
    subprocess.run(["mount", "--bind", "/dev", ROOT / "dev"], check=True)


def inside(*words: str, status: int = 0) -> str:
    """Run a command in the system; return what it says."""
    return run("/usr/sbin/chroot", str(ROOT), *words, status=status)


def run(*words: str, status: int = 0) -> str:
    """Run a command, with an environment as root has it; return what it says."""
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "DEBIAN_FRONTEND": "noninteractive",
        "LANG": "C.UTF-8",
    }
    done = subprocess.run(
        words,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        text=True,
    )
    print(f"$ {' '.join(words)}\n{done.stdout}", flush=True)
    assert done.returncode == status, f"status {done.returncode}"
    assert "Traceback" not in done.stdout or status
    return done.stdout


def ask(port: int = PORT) -> str:
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(b"hello\n")
        answer = client.makefile().readline()
    assert re.fullmatch(r"\[\d+\] hello\n", answer), answer
    return answer


#: How each of the others installs and removes in another root; what the packages need is there
#: under other names.
OTHERS = {
    "rpm": (
        ("rpm", f"--root={ROOT}", "--nodeps", "-Uvh"),
        ("rpm", f"--root={ROOT}", "--nodeps", "-e"),
    ),
    "pacman": (
        ("pacman", f"--root={ROOT}", "--noconfirm", "--noprogressbar", "-Udd"),
        ("pacman", f"--root={ROOT}", "--noconfirm", "-Rddn"),
    ),
}
MANAGER, SYSTEM, FOLDER = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])


def status(control: str = "web/control") -> dict[str, object]:
    words = ("socketprotectorctl", "--control", f"/run/socketprotector/{control}")
    found: dict[str, object] = json.loads(inside(*words, "status", "--json"))
    return found


def start_by_script(name: str, port: int = PORT) -> None:
    """Start an instance as its operator does, by the init script."""
    settings = ROOT / "etc/default/socketprotector.d"
    settings.mkdir(exist_ok=True)
    (settings / name).write_text(SETTINGS.format(name=name, port=port))
    os.chown(ROOT / "var/log/socketprotector", 65534, 65534)
    inside(INIT, "start", name)


def start_by_hand(name: str, port: int, *through: str, files: Sequence[str] = ()) -> None:
    """Start one from a shell.

    through: what executes it, as another user for instance; files: options that say where they are.
    """
    where = ("--name", name, "--log-file", f"/tmp/{name}.log", *files, f"127.0.0.1:{port}")
    inside(*through, "SocketProtector", *where, "--", "SampleClient", str(port))


def install(which: str, *through: str) -> str:
    """Install the packages of a folder, as apt does: both at once.

    through: what executes the package manager.
    """
    place = ROOT / "tmp" / which
    place.mkdir(exist_ok=True)
    for each in (FOLDER / which).iterdir():
        shutil.copy(each, place)
    names = sorted(each.name for each in place.iterdir())
    if MANAGER not in OTHERS:
        return inside(*through, "dpkg", "-i", *(f"/tmp/{which}/{name}" for name in names))
    return run(*OTHERS[MANAGER][0], *(str(place / name) for name in names))


def upgrade_under_load(which: str, by: Callable[[str], str] = install) -> str:
    """Install other packages while clients come; return what that says.  None of them fails."""
    with Steady(ask, 0.005) as clients:
        while clients.answered < 50 and not clients.failures:
            pass
        told = by(which)
        ask()
    answered, failures = clients.answered, clients.failures
    print(f"{which}: {answered} clients served, {len(failures)} not", flush=True)
    assert not failures, failures[:5]
    return told


def say_of_policy(policy: Path, status: int) -> None:
    """Allow (104) or forbid (101) that packages start and stop services."""
    policy.write_text(f"#!/bin/sh\nexit {status}\n")
    policy.chmod(0o755)


def left() -> list[str]:
    """The paths in the layer that are named after us, and are no package manager's records."""
    kept = (
        "var/lib/dpkg",
        "var/lib/rpm",
        "var/lib/pacman",
        "var/log/dpkg",
        "var/log/pacman",
        "var/cache",
    )
    found = []
    for path in UPPER.rglob("*"):
        name = str(path.relative_to(UPPER))
        ours = re.search("socketprotector|sample_?client", name, re.I)
        gone = path.is_char_device()  # how the layer notes what was removed
        if ours and not gone and not name.startswith(kept):
            found.append(name)
    return found


def live_as_deb() -> None:
    told = install("good")
    assert "warning" not in told.lower()
    assert "socketprotector-status" in inside("getent", "group", "socketprotector-status")
    inside(INIT, "status", status=3)  # nothing is configured, so nothing was started
    assert not [*(ROOT / "run").glob("socketprotector/*")]

    (ROOT / "etc/socketprotector/web.toml").write_text("# for purge\n")
    start_by_script("web")
    first = ask()
    assert "generation 2 is serving" in inside(INIT, "reload", "web")
    assert ask() != first
    inside("socketprotectorctl", "ready")
    before = status()
    # As nobody but its group, the exporter may look; no folder of the caller's is looked into.
    whose = ("stat", "-c", "%G %a", "/run/socketprotector/web/control")
    assert inside(*whose) == "socketprotector-status 660\n"
    planted = ROOT / "tmp/planted"
    planted.mkdir()
    (planted / "click.py").write_text("raise SystemExit('planted')\n")
    with_path = ("env", "PYTHONPATH=/tmp/planted")
    for program in ("SocketProtector", "socketprotectorctl", "socketprotector-exporter"):
        assert "0.9.0" in inside(*with_path, program, "--version")
    inside(*with_path, INIT, "status", "web")
    # Another one of root's, and one of a user's who is logged in.
    start_by_hand("hand", 4322)
    session = ROOT / "run/user/65534"
    session.mkdir(parents=True)
    os.chown(session, 65534, 65534)
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    start_by_hand("own", 4323, *user, "env", "XDG_RUNTIME_DIR=/run/user/65534")

    told = upgrade_under_load("next", by=lambda which: install(which, *with_path))
    assert f"upgraded: pid {before['pid']} runs 0.9.1" in told
    assert inside(*whose) == "socketprotector-status 660\n"
    own = "/run/user/65534/socketprotector/own.control"
    assert f"notice: a user's own: the protector at {own} goes on" in told
    assert status("hand.control")["version"] == "0.9.1"
    inside("socketprotectorctl", "--name", "hand", "stop")
    inside(*user, "socketprotectorctl", "--control", own, "upgrade")
    inside(*user, "socketprotectorctl", "--control", own, "stop")
    shutil.rmtree(ROOT / "run/user")
    after = status()
    assert (after["pid"], after["version"]) == (before["pid"], "0.9.1")
    assert after["route"] == before["route"]  # the same workers

    policy = ROOT / "usr/sbin/policy-rc.d"
    forbids = "policy-rc.d forbids to restart socketprotector: the protector at"
    say_of_policy(policy, 101)
    assert forbids in upgrade_under_load("after")
    say_of_policy(policy, 106)  # something else instead
    assert forbids in inside(UPGRADE)
    assert status()["restarts"] == after["restarts"]
    say_of_policy(policy, 105)  # it does not know
    assert f"upgraded: pid {before['pid']} runs 0.9.2" in inside(UPGRADE)
    policy.unlink()

    told = upgrade_under_load("broken")
    assert "broken release" in told
    assert "warning: the protector at /run/socketprotector/web/control goes on" in told
    assert "install ok installed" in inside("dpkg", "-s", "socketprotector")
    ask()

    # The version of before instead, and then one that is two versions newer.
    for which, version in (("good", "0.9.0"), ("after", "0.9.2")):
        told = upgrade_under_load(which)
        assert f"upgraded: pid {before['pid']} runs {version}" in told
    assert status()["route"] == before["route"]

    for line, word in COMPLETED.items():
        name = line.split()[0]
        script = (
            f". /usr/share/bash-completion/completions/{name}; COMP_LINE='{line}'; "
            "COMP_POINT=${#COMP_LINE}; "
            f"_{name.replace('-', '_')}_completion {name}; echo ${{COMPREPLY[@]}}"
        )
        assert inside("bash", "-c", script) == f"{word}\n"

    rotated = (
        "sed -n '/postrotate/,/endscript/{//!p}' /etc/logrotate.d/socketprotector | sh -s web.log"
    )
    inside("sh", "-c", rotated)
    assert "event=reopened" in (ROOT / "var/log/socketprotector/web.log").read_text()

    say_of_policy(policy, 104)  # no init runs here, so invoke-rc.d would do nothing by itself
    start_by_hand("hand", 4322)
    by_hand = f"hand.control (pid {status('hand.control')['pid']}) was started by hand and is not"
    removed = inside("dpkg", "-r", "socketprotector", EXPORTER, CLIENT)
    assert_refused(PORT)
    assert by_hand in removed, "what is not stopped is named"
    assert "/run/socketprotector/web" not in removed
    ask(4322)
    os.kill(int(by_hand.split("pid ")[1].split(")")[0]), signal.SIGTERM)
    assert not (ROOT / "usr/bin/SocketProtector").exists()
    assert (ROOT / "etc/init.d/socketprotector").exists()  # a setting of the operator's, so far
    inside("sh", "-c", rotated)

    inside("dpkg", "-P", "socketprotector", EXPORTER, CLIENT)
    assert not left(), left()
    assert not [*(ROOT / "run").glob("socketprotector*")]
    assert "socketprotector" not in (ROOT / "etc/group").read_text()


#: Notes what it is told.  `web` is an instance of the unit, as far as this one knows.
SYSTEMCTL = """\
#!/bin/sh
echo "$@" >>/tmp/told
case $1 in
    list-units) echo "socketprotector@web.service loaded active running -" ;;
    --quiet) [ "$3" = socketprotector@web.service ] ;;
    stop) socketprotectorctl --name web stop ;;
esac
"""
#: Of one that its operator wants to be left alone.
POLICY = """\
#!/bin/sh
case $1 in
    socketprotector@web.service) exit 101 ;;
    *) exit 104 ;;
esac
"""


def orders(told: Path) -> list[str]:
    """What systemd was told but to read its units, which it was; and no questions."""
    lines = told.read_text().splitlines()
    print(lines, flush=True)
    others = [line for line in lines if not line.endswith("daemon-reload")]
    assert len(others) < len(lines)
    return [line for line in others if not line.startswith(("list-units", "--quiet is-active"))]


def live_as_deb_beside_systemd() -> None:
    """What the package tells systemd: to read its units, to restart the exporter if it runs, and
    what to stop at the end; no more.
    """
    (ROOT / "run/systemd/system").mkdir(parents=True)
    for path, text in (("usr/bin/systemctl", SYSTEMCTL), ("usr/sbin/policy-rc.d", POLICY)):
        (ROOT / path).write_text(text)
        (ROOT / path).chmod(0o755)
    told = ROOT / "tmp/told"
    install("good")
    # One that the unit has started, and one of the init script, which is not systemd's.
    place = "/run/socketprotector/web"
    (ROOT / place[1:]).mkdir(parents=True)
    files = ("--control", f"{place}/control", "--pid-file", f"{place}/pid")
    start_by_hand("web", PORT, files=files)
    start_by_script("shop", 4322)

    said = install("next")

    exporters = "socketprotector-exporter.service socketprotector-page.service"
    assert orders(told) == [f"try-restart {exporters}"]
    assert "policy-rc.d forbids to restart socketprotector@web.service" in said
    assert (status()["version"], status("shop/control")["version"]) == ("0.9.0", "0.9.1")

    told.unlink()
    inside("dpkg", "-r", "socketprotector", EXPORTER)
    assert orders(told) == []  # the policy forbids that, too
    ask()
    assert_refused(4322)

    install("next")
    (ROOT / "usr/sbin/policy-rc.d").unlink()
    told.unlink()
    inside("dpkg", "-P", "socketprotector", EXPORTER, CLIENT)
    assert orders(told) == ["stop socketprotector@web.service"]
    assert_refused(PORT)
    assert not left(), left()


def live_as_deb_in_a_container() -> None:
    """PID 1 is the protector: where policy-rc.d forbids restarts it goes on, until it is asked.

    It forbids them in images of Debian.  Units of ours are masked, which changes nothing.
    """
    say_of_policy(ROOT / "usr/sbin/policy-rc.d", 101)
    install("good")
    (ROOT / "etc/systemd/system").mkdir(parents=True, exist_ok=True)
    for unit in ("socketprotector@.service", "socketprotector-page.service"):
        (ROOT / "etc/systemd/system" / unit).symlink_to("/dev/null")
    words = ("SocketProtector", "-f", "--name", "web", str(PORT), "--", "SampleClient", str(PORT))
    pid_1 = ("unshare", "--pid", "--fork", "--kill-child", f"--mount-proc={ROOT}/proc")
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
    container = subprocess.Popen(
        [*pid_1, "chroot", str(ROOT), *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert container.stderr is not None
    while "event=ready" not in (line := container.stderr.readline()):
        print(line, end="", flush=True)
        assert line, "it has ended"
    before = status("web.control")
    assert before["pid"] == 1

    told = upgrade_under_load("next")

    assert "notice: policy-rc.d forbids to restart socketprotector: the protector at" in told
    assert "later: socketprotectorctl --control /run/socketprotector/web.control upgrade" in told
    assert status("web.control")["version"] == before["version"] == "0.9.0"
    inside("socketprotectorctl", "reload")  # the old program, with the new one's files
    ask()
    told = upgrade_under_load("next", by=lambda _: inside("socketprotectorctl", "upgrade"))
    assert "upgraded: pid 1 runs 0.9.1" in told
    (ROOT / "usr/sbin/policy-rc.d").unlink()
    assert "upgraded: pid 1 runs 0.9.2" in upgrade_under_load("after")

    inside("dpkg", "-r", "socketprotector", EXPORTER)
    ask()  # what no unit and no script has started goes on
    container.kill()
    container.wait()


def repository(which: str) -> None:
    """Make the packages of a folder those that apt knows, and no others."""
    place = ROOT / "repository"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(FOLDER / which, place)
    index = subprocess.run(
        ["dpkg-scanpackages", "--multiversion", "."], cwd=place, capture_output=True, check=True
    ).stdout
    (place / "Packages").write_bytes(index)
    (place / "Release").write_text(
        "Origin: SocketProtector\nSuite: stable\nSHA256:\n"
        f" {hashlib.sha256(index).hexdigest()} {len(index)} Packages\n"
    )
    (ROOT / "etc/apt/sources.list").write_text("deb [trusted=yes] file:/repository ./\n")
    inside("apt-get", "update")


def upgrade_unattended(which: str) -> str:
    repository(which)
    # `a`: restart whatever uses what was replaced, as on recent Ubuntu.
    told = inside("env", "NEEDRESTART_MODE=a", "unattended-upgrade", "--verbose")
    return told + (ROOT / "var/log/unattended-upgrades/unattended-upgrades-dpkg.log").read_text(
        encoding="utf-8"
    )


def live_as_deb_unattended() -> None:
    """The protector is upgraded by the package, and neither of the two restarts it."""
    ours = 'Unattended-Upgrade::Origins-Pattern { "origin=SocketProtector"; };\n'
    (ROOT / "etc/apt/apt.conf.d/99ours").write_text(ours)
    # No init runs here, so invoke-rc.d would do nothing by itself.
    say_of_policy(ROOT / "usr/sbin/policy-rc.d", 104)
    install("good")
    start_by_script("web")
    before = status()

    told = upgrade_under_load("next", by=upgrade_unattended)

    assert f"upgraded: pid {before['pid']} runs 0.9.1" in told
    said = inside("needrestart", "-v", "-r", "a")
    assert re.search(r"socketprotector", said, re.I), "needrestart does not see it at all"
    after = status()
    assert (after["pid"], after["route"], after["restarts"]) == (before["pid"], before["route"], 1)

    told = upgrade_under_load("broken", by=upgrade_unattended)
    assert "warning: the protector at /run/socketprotector/web/control goes on" in told
    inside(INIT, "stop", "web")


def assert_refused(port: int) -> None:
    try:
        ask(port)
    except ConnectionRefusedError:
        return
    raise AssertionError("removed, and it still serves")


def live_as_other(client: str) -> None:
    """On a Debian, which looks for modules of its own elsewhere, and without its init script."""
    packages = f"/usr/lib/python3.{sys.version_info[1]}/site-packages\n"
    (ROOT / "usr/lib/python3/dist-packages/other.pth").write_text(packages)
    if not (ROOT / "usr/bin/python").exists():
        (ROOT / "usr/bin/python").symlink_to("python3")
    (ROOT / "var/lib/pacman").mkdir(exist_ok=True)
    install("good")
    control = "/run/socketprotector/web/control"
    (ROOT / control[1:]).parent.mkdir(parents=True)
    log = "/var/log/socketprotector/web.log"
    where = ("--name", "web", "--control", control, "--log-file", log, "127.0.0.1:4321")
    inside("SocketProtector", *where, "--", "SampleClient", "4321")
    ask()
    inside("socketprotectorctl", "ready")
    before = status()

    told = upgrade_under_load("next")

    assert f"upgraded: pid {before['pid']} runs 0.9.1" in told
    after = status()
    assert (after["pid"], after["route"]) == (before["pid"], before["route"])
    assert after["version"] == "0.9.1"
    assert inside("socketprotector-run", "--help")
    inside("socketprotectorctl", "stop")
    (ROOT / log[1:]).unlink()
    (ROOT / "run/socketprotector/web").rmdir()
    run(*OTHERS[MANAGER][1], "socketprotector", EXPORTER, client)
    assert not left(), left()


def main() -> None:
    mount(SYSTEM)
    if MANAGER == "deb":
        live_as_deb()
    elif MANAGER == "systemd":
        live_as_deb_beside_systemd()
    elif MANAGER == "unattended":
        live_as_deb_unattended()
    elif MANAGER == "container":
        live_as_deb_in_a_container()
    else:
        python = {"rpm": "python3", "pacman": "python"}[MANAGER]
        live_as_other(f"{python}-socketprotector-client")
    print("LIVED", flush=True)


if __name__ == "__main__":
    main()
