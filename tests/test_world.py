"""A run's own world: ports, names and /run of its own, and no more rights than before."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from tests import needs
from tests.running import ROOT

ENTERS = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests import world; "
ENTERS += "from pathlib import Path; said = world.enter(Path(sys.argv[1])); "


def inside(code: str, clone: Path = ROOT) -> str:
    """Run code in a world of its own; return what it says."""
    code = f"{ENTERS}print(said, file=sys.stderr)\n{code}"
    words = (sys.executable, "-I", "-c", code, str(clone))
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    why = done.stderr.strip()
    if why:
        needs.skip("namespaces", why)
    return done.stdout


def test_it_has_ports_and_names_of_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours:
        port = ours.getsockname()[1]
        said = inside(
            "import socket, os\n"
            f"one = socket.create_server(('127.0.0.1', {port}))\n"
            "socket.create_connection(one.getsockname()).close()\n"
            "open('/tmp/ours', 'x').close()\n"
            "print(os.listdir('/run'), os.path.exists('/tmp/ours'))"
        )

    assert said == "['systemd'] True\n"
    assert not Path("/tmp/ours").exists()


def test_it_gives_no_right_that_the_user_does_not_have_outside() -> None:
    code = "print(*(a for a in open('/proc/self/status') if a[:4] in ('Uid:', 'CapE')), sep='')"
    outside = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(("Uid:", "CapE"))
    ]

    assert [line for line in inside(code).splitlines() if line] == outside


@needs.ROOT
def test_every_user_may_reach_the_clone_there_and_nowhere_else(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "clone").mkdir(parents=True)
    (home / "clone" / "file").write_text("in the clone")
    (home / "link").symlink_to("clone")
    (home / "secret").touch(mode=0o600)
    home.chmod(0o700)

    said = inside(
        "import os\n"
        f"os.chdir({str(home)!r})\n"
        "print(sorted(os.listdir('.')))\n"
        f"open('clone/new', 'w').write('kept')\n"
        "os.setresuid(65534, 65534, 65534)\n"
        f"print(open({str(home / 'clone' / 'file')!r}).read())\n"
        f"print(os.access({str(home / 'secret')!r}, os.R_OK))\n",
        home / "clone",
    )

    assert said == "['clone', 'link', 'secret']\nin the clone\nFalse\n"
    assert (home / "clone" / "new").read_text() == "kept"
    assert home.stat().st_mode & 0o777 == 0o700
