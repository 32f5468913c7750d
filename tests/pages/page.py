"""Reads what a page of the documents shows: commands, files, and what is said.

A block between ``` is, by the words behind these:

    sh              commands, run in the order of the page
    sh terminal     commands that do not end: each has a terminal of its own until the page ends;
                    the page goes on when a protector there has said that it is ready
    sh tree         commands for the folder of the sources, where make only says what it would do
    sh systemd      commands that want systemd as PID 1 (sh apparmor, sh selinux: in the kernel):
                    each is judged by its own program, which may only say that this is missing
    control         what is said over the control socket of `web`: `> ` by us, `< ` to us
    json status     what `web` says of itself when the page ends: the same names are in it
    text            what the block before has said: each line, `...` stands for anything
    text terminal   the same of the terminal before, when the page ends
    line, message   a line of the log, a worker's message: a test of its own takes it from here;
                    so it does with sh ours: what replaces another tool's command
    drawing         nothing that could be run, as mermaid; and report, what a long run has said
    another one     a file, whose first line (the second, behind #!) names it: `# /etc/web.toml`;
                    what /bin/sh is to run it has to understand

A command below the line `# exit status 3` ends with that, the others with 0.

What stands between .EX and .EE of a manual page is `sh`; with `.\\" terminal` before it,
`sh terminal`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

_FENCE = re.compile(r"^```(.*)$")
_INDENTED = re.compile(r"^    (?=\S)")
_NAMED = re.compile(r"^(?:#!.*\n)?(?:#|//) (\S+)\n")
_STATUS = re.compile(r"^# exit status (\d+)\b.*\n((?:.*\\\n)*.*)$", re.MULTILINE)


#: What is not there, and what programs say of that once they have understood what they are to do.
_NOT_HERE = {
    "systemd": "System has not been booted with systemd|Failed to connect to bus",
    "apparmor": "unable to find a suitable fs in /proc/mounts",
    "selinux": "SELinux policy is not managed",
}


@dataclass(frozen=True)
class Block:
    """A piece of a page; kind: the words behind ```, "" for what is indented."""

    line: int
    kind: str
    text: str

    @property
    def is_run(self) -> bool:
        return self.kind in _RUN

    @property
    def is_text(self) -> bool:
        return self.kind in ("text", "text terminal")

    @property
    def is_judged(self) -> bool:
        return self.kind.removeprefix("sh ") in _NOT_HERE

    @property
    def is_picture(self) -> bool:
        """Whether it is nothing that could be run; a command is not hidden in it."""
        begin = (line.strip("$ ").partition(" ")[0] for line in self.text.split("\n"))
        return self.kind in ("drawing", "mermaid", "report") and _PROGRAMS.isdisjoint(begin)

    @property
    def is_output(self) -> bool:
        """Whether a program has written it: its lines are as long as they are."""
        return self.kind.partition(" ")[0] in _OUTPUT

    @property
    def taker(self) -> str | None:
        """The test that takes it from the page."""
        return _TAKERS.get(self.kind)

    @property
    def file(self) -> str | None:
        """The name of the file that it is."""
        named = _NAMED.match(self.text)
        is_one = self.kind and self.kind.split()[0] not in ("sh", "control", "json", "text")
        return named[1] if named and is_one else None

    @property
    def commands(self) -> list[str]:
        """Its commands, each a line, without remarks."""
        whole = self.text.replace("\\\n", " ")
        lines = (re.sub(r"(^|\s+)# .*$", "", line).strip() for line in whole.split("\n"))
        return [line for line in lines if line]


def blocks(path: Path) -> list[Block]:
    """Return all of a page, in its order."""
    found: list[Block] = []
    kind: str | None = None
    began, taken = 0, list[str]()
    text = path.read_text(encoding="utf-8")
    lines = (text if path.suffix == ".md" else _of_manual(text)).split("\n")
    for number, line in enumerate([*lines, ""], 1):
        fence = _FENCE.match(line)
        # A paragraph, or an entry of a list, may go on with spaces before it.
        if kind is None and not fence and not (_INDENTED.match(line) and not lines[number - 2]):
            continue
        if kind is None:
            kind, began, taken = (fence[1] or "plain") if fence else "", number, []
            if fence:
                continue
        if kind == "":
            taken.append(_INDENTED.sub("", line))
            if not lines[number : number + 1] or not _INDENTED.match(lines[number]):
                found.append(Block(began, "", "\n".join(taken) + "\n"))
                kind = None
        elif fence is not None:
            found.append(Block(began, kind, "".join(f"{each}\n" for each in taken)))
            kind = None
        else:
            taken.append(line)
    assert kind is None, f"{path}: a block that does not end"
    return found


def _of_manual(text: str) -> str:
    """Return a manual page's examples as Markdown, each in its line."""
    text = re.sub(r'^\.\\" terminal\n\.EX$', "\n```sh terminal", text, flags=re.MULTILINE)
    text = re.sub(r"^\.EX$", "```sh", text, flags=re.MULTILINE)
    text = re.sub(r"^\.EE$", "```", text, flags=re.MULTILINE)
    return text.replace("\\-", "-").replace("\\e", "\\")


def script(page: list[Block]) -> str:
    """Return what a shell is to run for a page; each block says its line before."""
    words = ["set -euo pipefail", _FUNCTIONS]
    last = []
    for block in page:
        begin = f"echo; echo '{_mark(block)}'"
        if block.file is not None:
            words.append(_written(block.file, block.text))
        elif block.kind == "sh terminal":
            for each in block.commands:
                words.append(f"_terminal {quote(each)} {_SCREENS}{block.line} &")
                if each.startswith("SocketProtector"):
                    words.append(f"_until_ready {_SCREENS}{block.line}")
            last += [begin, f"_screen {_SCREENS}{block.line}"]
        elif block.kind in ("control", "json status"):
            talk = f"{begin}\n$PAGE_ROOT/tests/pages/talk.py {block.kind.split()[-1]} <<'{_EOF}'"
            (words if block.kind == "control" else last).append(f"{talk}\n{block.text}{_EOF}")
        elif block.is_run:
            commands = _STATUS.sub(_with_status, block.text)
            words += [begin, f"(cd $PAGE_ROOT\n{commands})" if " " in block.kind else commands]
        elif block.is_judged:
            missing = _NOT_HERE[block.kind.removeprefix("sh ")]
            words += [f"_judge '{missing}' {each}" for each in block.commands]
    return "\n".join([*words, *last, f"echo; echo '{_END}'"])


def said(output: str, page: list[Block]) -> dict[Block, str]:
    """Return what each block that was run has said; nothing of those that were not come to."""
    found = {}
    for block in page:
        _, begun, rest = output.partition(f"\n{_mark(block)}\n")
        if block.is_run and begun:
            found[block] = re.split(r"^\+\+\+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    return found


def is_whole(output: str) -> bool:
    """Whether a page was run to its end."""
    return f"\n{_END}\n" in output


def is_like(shown: str, line: str) -> bool:
    """Whether a line that was said is the one that is shown."""
    return re.fullmatch(".*".join(map(re.escape, shown.split("..."))), line.strip()) is not None


_FUNCTIONS = """_judge() {
    local said
    said=$("${@:2}" 2>&1) || grep -qE "$1" <<<"$said" || { echo "${*:2}: $said"; exit 1; }
}
_terminal() {
    script -qec "$(declare -f); $1" /dev/null </dev/null >"$2" 2>&1 || echo "+ failed: $?" >>"$2"
}
_until_ready() {
    for _ in $(seq 600); do ! grep -qs event=ready "$1" || return 0; sleep 0.05; done
    cat "$1"
    exit 1
}
_screen() {
    cat "$1"
    ! grep -q '^+ failed' "$1"
}
make() { command make --dry-run "$@"; }"""
_END = "+++ the end of the page"
_EOF = "END-OF-THE-FILE"
_OUTPUT = {"control", "json", "line", "message", "report", "text"}
_RUN = {"sh", "sh terminal", "sh tree", "control", "json status"}
_TAKERS = {
    "line": "tests/boundary/test_crash_loop_summary.py",
    "message": "tests/client/test_notify.py",
    "sh ours": "tests/scenarios/test_moving.py",
}
_PROGRAMS = {
    *("SocketProtector", "socketprotector", "socketprotectorctl", "socketprotector-run"),
    *("apt-get", "curl", "make", "pip", "python", "sudo", "systemctl", "uvx"),
}
#: Each is what one terminal has shown.
_SCREENS = "/run/screen-"


def _mark(block: Block) -> str:
    return f"+++ line {block.line}"


def _written(name: str, text: str) -> str:
    folder = f'mkdir -p "$(dirname {name})"'
    return f"{folder}\ncat >{name} <<'{_EOF}'\n{text}{_EOF}\n" + (
        f"chmod 755 {name}; sh -n {name}" if text.startswith("#!/bin/sh") else ""
    )


def _with_status(found: re.Match[str]) -> str:
    return f"_is=0; {found[2]} || _is=$?; [ $_is = {found[1]} ] || {{ echo status $_is; exit 1; }}"
