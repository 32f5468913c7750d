"""Runs a command as on another system: without /proc, without a shell, with calls that fail.

    python elsewhere.py [--no-proc | --hidepid] [--no-shell | --root FOLDER] [--nobody]
        [--fails CALL=ERRNO]... [--unit FILE] -- COMMAND...

On the standard library alone; executes COMMAND in its own place.  All but --fails and --unit takes
root: mounts are made in a mount namespace of its own and are gone with the command.

Source: unshare(2), mount(2), pivot_root(2) (chroot(2) does here), seccomp(2), and the kernel's
asm/unistd.h for the numbers; systemd.exec(5) and seccomp_init(3) for the filters of a unit.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import re
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

_CLONE_NEWNS = 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
#: Where the other root is put together: every system has this folder, and hardly anything there.
_ROOT = Path("/mnt")
_WITH_PROGRAMS = ("bin", "sbin")

#: Numbers on x86_64 and aarch64; then, where only one use of the call fails: which argument has
#: to have which value.
CALLS: dict[str, tuple[int, int, tuple[int, int] | None]] = {
    "clone3": (435, 435, None),
    "close_range": (436, 436, None),
    "faccessat2": (439, 439, None),
    "getrandom": (318, 278, None),
    "memfd_create": (319, 279, None),
    "pidfd_open": (434, 434, None),
    "pidfd_send_signal": (424, 424, None),
    "rseq": (334, 293, None),
    "statx": (332, 291, None),
    "sched_getaffinity": (204, 123, None),
    "sched_getscheduler": (145, 120, None),
    "sched_setscheduler": (144, 119, None),
    "F_ADD_SEALS": (72, 25, (1, 1033)),
    "P_PIDFD": (247, 95, (0, 3)),
    "SO_ATTACH_REUSEPORT_CBPF": (54, 208, (2, 51)),
    "SO_ATTACH_FILTER": (54, 208, (2, 26)),
    "SO_PEERGROUPS": (55, 209, (2, 59)),
    "SO_PEERPIDFD": (55, 209, (2, 77)),
    "NETLINK_SOCK_DIAG": (41, 198, (0, 16)),
}
_MACHINES = ("x86_64", "aarch64")

_libc = ctypes.CDLL(None, use_errno=True)


def known_machine() -> bool:
    """Whether the numbers of this machine's calls are known here."""
    return os.uname().machine in _MACHINES


def _done(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def _mount(source: str, target: Path | str, kind: str, flags: int, data: str = "") -> None:
    words = (source, str(target), kind)
    given = [each.encode() for each in words]
    _done(_libc.mount(*given, ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def _bind(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.readlink(source))
        return
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    _mount(str(source), target, "", _MS_BIND | _MS_REC)


def own_mounts() -> None:
    """Have a mount namespace of our own, from which nothing reaches the one it came from."""
    _done(_libc.unshare(_CLONE_NEWNS), "unshare")
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)


def interpreter_for_any_user() -> None:
    """Let every user reach this interpreter, which may be in root's home."""
    home = Path(sys.base_prefix)
    for folder in reversed(home.parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            _bind(home, _ROOT)
            _mount("open", folder, "tmpfs", 0, "mode=0755")
            _bind(_ROOT, home)
            _done(_libc.umount2(str(_ROOT).encode(), _MNT_DETACH), "umount")
            return


def _names_of(program: Path) -> list[Path]:
    """Return a program's path, and those that it leads to as a symbolic link."""
    names = [program]
    while names[-1].is_symlink():
        names.append(names[-1].parent / names[-1].readlink())
    return names


def without_programs() -> None:
    """Have a root without /bin and /usr/bin, as a container has that was made for one program."""
    here = os.getcwd()
    _mount("other", _ROOT, "tmpfs", 0)
    for each in Path("/").iterdir():
        if each.name not in (*_WITH_PROGRAMS, "usr", _ROOT.name):
            _bind(each, _ROOT / each.name)
    for each in Path("/usr").iterdir():
        if each.name not in _WITH_PROGRAMS:
            _bind(each, _ROOT / "usr" / each.name)
    for each in _names_of(Path(sys.executable)):
        if not (_ROOT / each.relative_to("/")).exists():
            _bind(each, _ROOT / each.relative_to("/"))
    os.chroot(_ROOT)
    os.chdir(here)
    assert not os.path.exists("/bin/sh")


def in_root(root: Path, *shared: Path) -> None:
    """Have another root, with what is not of a distribution in it as it is here."""
    here = os.getcwd()
    for each in (Path("/proc"), Path("/dev"), *shared):
        _bind(each, root / each.relative_to("/"))
    os.chroot(root)
    os.chdir(here)


def fail(calls: dict[str, int]) -> None:
    """Let system calls fail from here on, in whatever is executed too."""
    machine = _MACHINES.index(os.uname().machine)
    program: list[tuple[int, int, int, int]] = []
    for name, number in calls.items():
        *numbers, argument = CALLS[name]
        nr = numbers[machine]
        program.append((0x20, 0, 0, 0))  # load the call's number
        program.append((0x15, 0, 3 if argument else 1, nr))  # another one: on to the next
        if argument is not None:
            program.append((0x20, 0, 0, 16 + 8 * argument[0]))  # the low half of an argument
            program.append((0x15, 0, 1, argument[1]))
        program.append((0x06, 0, 0, 0x00050000 | number))  # SECCOMP_RET_ERRNO
    program.append((0x06, 0, 0, 0x7FFF0000))  # SECCOMP_RET_ALLOW
    code = b"".join(struct.pack("HBBI", *each) for each in program)
    kept = ctypes.create_string_buffer(code, len(code))
    filters = struct.pack("HxxxxxxP", len(program), ctypes.addressof(kept))
    if os.geteuid() != 0:
        _done(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _done(_libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, filters, 0, 0), "seccomp")


_SECCOMP = "libseccomp.so.2"
_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_EQUAL = 4
#: More than there are families of sockets.
_FAMILIES = 64


class _Argument(ctypes.Structure):
    _fields_ = (
        ("number", ctypes.c_uint),
        ("compared", ctypes.c_int),
        ("value", ctypes.c_uint64),
        ("_", ctypes.c_uint64),
    )


def can_filter_as_systemd() -> bool:
    """Whether this machine has what under_unit() needs."""
    try:
        ctypes.CDLL(_SECCOMP)
        return bool(_allowed_calls(["@system-service"]))
    except (OSError, subprocess.SubprocessError):
        return False


def _allowed_calls(words: list[str]) -> set[str]:
    """Return the calls that SystemCallFilter= of a unit allows, by this machine's systemd."""
    listed = ["systemd-analyze", "--no-pager", "syscall-filter"]
    text = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
    groups = {
        group: re.findall(r"^    ([@\w-]+)$", members, re.MULTILINE)
        for group, members in re.findall(r"^(@[\w-]+)\n((?: .*\n)*)", text, re.MULTILINE)
    }
    found: set[str] = set()
    waiting = ["@default", *words]  # systemd adds the first
    while waiting:
        word = waiting.pop()
        if word.startswith("@"):
            waiting += groups[word]
        else:
            found.add(word)
    return found


def _setting(text: str, name: str) -> list[str]:
    [found] = re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)
    return str(found).split()


def under_unit(unit: Path) -> None:
    """Allow the system calls and the families of sockets that a systemd unit does.

    As under systemd there is no socket of another family (EAFNOSUPPORT).  Another call kills the
    process by SIGSYS, whatever error the unit has for it: no substitute may hide the call.
    """
    text = unit.read_text(encoding="utf-8")
    calls = _allowed_calls(_setting(text, "SystemCallFilter"))
    families = {getattr(socket, word) for word in _setting(text, "RestrictAddressFamilies")}
    seccomp = ctypes.CDLL(_SECCOMP, use_errno=True)
    seccomp.seccomp_init.restype = ctypes.c_void_p

    def number(call: str) -> int:
        return int(seccomp.seccomp_syscall_resolve_name(call.encode()))

    def add(rules: ctypes.c_void_p, action: int, call: str, *arguments: _Argument) -> None:
        compared = (_Argument * len(arguments))(*arguments)
        done = seccomp.seccomp_rule_add_array(
            rules, ctypes.c_uint32(action), number(call), len(arguments), compared
        )
        assert done == 0, (call, done)

    # The second one forbids seccomp(2).
    sockets = ctypes.c_void_p(seccomp.seccomp_init(ctypes.c_uint32(_ALLOW)))
    for family in sorted({*range(_FAMILIES)} - families):
        first = _Argument(0, _EQUAL, family, 0)
        add(sockets, _ERRNO | errno.EAFNOSUPPORT, "socket", first)
    rest = ctypes.c_void_p(seccomp.seccomp_init(ctypes.c_uint32(_KILL_PROCESS)))
    for call in calls:
        if number(call) >= 0:  # another architecture's are negative
            add(rest, _ALLOW, call)
    for rules in (sockets, rest):
        assert seccomp.seccomp_load(rules) == 0, "seccomp_load"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-proc", action="store_true", help="none is mounted")
    parser.add_argument("--hidepid", action="store_true", help="of other users nothing is seen")
    parser.add_argument("--no-shell", action="store_true", help="nor any other program in /usr/bin")
    parser.add_argument("--fails", action="append", default=[], metavar="CALL=ERRNO")
    parser.add_argument("--unit", type=Path, help="system calls: those that this unit allows")
    parser.add_argument("--root", help="with the folders of temporary files and of these tests")
    parser.add_argument("--nobody", action="store_true", help="run it as that user")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    if given.no_proc or given.hidepid or given.no_shell or given.root:
        own_mounts()
        interpreter_for_any_user()
    if given.hidepid:
        _mount("proc", "/proc", "proc", 0, "hidepid=2")
    if given.no_shell:
        without_programs()
    if given.root:
        tests = Path(__file__).resolve().parents[2]
        in_root(Path(given.root), Path(tempfile.gettempdir()), tests)
    if given.no_proc:
        _done(_libc.umount2(b"/proc", _MNT_DETACH), "umount /proc")
    if given.fails:
        pairs = (each.split("=") for each in given.fails)
        fail({name: getattr(errno, number) for name, number in pairs})
    if given.nobody:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    if given.unit:
        under_unit(given.unit)
    os.execv(given.command[0], given.command)


if __name__ == "__main__":
    main()
