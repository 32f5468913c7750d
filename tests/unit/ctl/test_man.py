"""The man pages render without a warning, and name every option and command that there is."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from socketprotector_client import run
from socketprotector_exporter import main as exporter

from socketprotector.ctl import (
    help_pages,
    main,  # noqa: F401 -- adds the commands
    status_table,
)
from socketprotector.ctl.cli import program
from socketprotector.demo import cli as demo
from socketprotector.launch import cli, listen_spec, socket_options
from tests import needs
from tests.running import ROOT
from tests.together import together

PAGES = {
    "socketprotectorctl.1": program,
    "SocketProtector.8": cli.COMMAND,
    "socketprotector-exporter.8": exporter._command,
}
#: Options that are spoken of there, beside those of the page's own command.
OTHERS = {"SocketProtector.8": demo.command}
#: Where all are, of other programs, too.
FOLDERS = (ROOT / "docs" / "man", ROOT / "client_lib" / "man", ROOT / "exporter" / "man")
FILES = {path.name: path for folder in FOLDERS for path in folder.iterdir()}


def text_of(page: str) -> str:
    """The page's text without its markup."""
    source = FILES[page].read_text(encoding="utf-8")
    return re.sub(r"\\f[BRIP]", "", source).replace("\\-", "-").replace("\\&", "")


def options_of(command: click.Command) -> set[str]:
    return {
        option
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_option_and_command_has_its_place(page: str) -> None:
    words = set(re.findall(r"[\w?-]+", text_of(page)))
    command = PAGES[page]
    wanted = options_of(command) | (options_of(OTHERS[page]) if page in OTHERS else set())
    shown = {n: c for n, c in getattr(command, "commands", {}).items() if not c.hidden}
    for name, each in shown.items():
        wanted |= {name, *options_of(each)}

    assert wanted <= words, f"not in docs/man/{page}: {sorted(wanted - words)}"


def test_commands_stand_in_the_groups_of_help_all() -> None:
    section = text_of("socketprotectorctl.1").partition(".SH COMMANDS\n")[2].partition(".SH ")[0]
    titles = re.findall(r"^\.SS (.+)", section, re.MULTILINE)
    names = re.findall(r"^\.TP\n\.\w+ \"?([\w-]+)", section, re.MULTILINE)

    assert titles == [*help_pages.GROUPS]
    assert names == [name for group in help_pages.GROUPS.values() for name in group]
    assert sorted(names) == sorted(program.commands)


def test_help_of_ctl_is_one_screen_and_help_all_has_every_command() -> None:
    runner = CliRunner()
    brief, full = (
        runner.invoke(program, [page], prog_name="socketprotectorctl").output
        for page in ("--help", "--help-all")
    )
    shown = re.findall(r"^  ([a-z][a-z-]*)  ", full.partition("--help  ")[2], re.MULTILINE)

    assert len(brief.splitlines()) <= 40
    assert max(map(len, brief.splitlines())) <= 80
    assert re.findall(r"^  ([a-z][a-z-]*)  ", brief, re.MULTILINE) == [*help_pages.COMMON]
    assert shown == [name for group in help_pages.GROUPS.values() for name in group]
    assert "  130  interrupted" in full
    for line in help_pages.EXAMPLES:
        words = shlex.split(line.partition(" &&")[0])[1:]
        program.commands[words[2]].make_context(words[2], words[3:], parent=None)


def test_help_of_status_explains_each_column() -> None:
    shown = CliRunner().invoke(program, ["status", "--help"]).output
    columns = {*status_table._GENERATIONS.split(), *status_table._WORKERS.split()}

    clear = {"PHASE", "PID", "STATE"}
    assert columns - clear <= set(re.findall(r"[A-Z][A-Z0-9-]+", shown))


@pytest.mark.parametrize("page", PAGES)
def test_every_long_option_that_is_named_exists(page: str) -> None:
    command = PAGES[page]
    known = options_of(command) | {"--help", "--version"}
    for each in getattr(command, "commands", {}).values():
        known |= options_of(each)
    # Those of the other program are spoken of, too.
    known |= options_of(OTHERS[page]) if page in OTHERS else set()
    known |= options_of(cli.COMMAND) | {"--control", "--control-group", "--no-control"}

    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text_of(page))) <= known


def test_every_program_has_a_page() -> None:
    programs = set()
    for folder in (ROOT, ROOT / "client_lib", ROOT / "exporter"):
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        programs |= set(project["scripts"])

    assert {Path(name).stem for name in FILES} == programs


def test_that_of_run_has_its_options() -> None:
    text = FILES["socketprotector-run.1"].read_text(encoding="utf-8").replace("\\-", "-")
    words = set(re.findall(r"--[a-z]+", run._parser().format_help()))

    assert words <= set(re.findall(r"--[a-z]+", text))


@pytest.mark.parametrize("page", sorted(FILES))
def test_it_renders_without_a_warning(page: str) -> None:
    path = str(FILES[page])
    if linked := re.fullmatch(r"\.so man\d/(.+)\n", FILES[page].read_text(encoding="utf-8")):
        assert linked[1] in FILES
        return
    if shutil.which("groff"):
        command = ["groff", "-man", "-ww", "-Tutf8", path]
    elif shutil.which("mandoc"):
        command = ["mandoc", "-T", "lint", "-W", "warning", path]
    else:
        needs.skip("groff or mandoc")

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@together("page", FILES)
def test_the_site_knows_each_macro(page: str) -> None:
    """Its parser is ours, and an error of it would be seen by `make docs` alone."""
    known = re.findall(r"def _do_(\w+)", (ROOT / "tools/site/man_page.py").read_text())
    used = re.findall(r"^\.(\w+)", FILES[page].read_text(encoding="utf-8"), re.MULTILINE)

    assert {each for each in used if set(each) - set("BIR")} <= {*known, "so"}


@together("page", FILES)
def test_the_tag_of_a_paragraph_is_one_line(page: str) -> None:
    """What follows in the next line is shown as the paragraph's text."""
    source = FILES[page].read_text(encoding="utf-8")

    for tag in re.findall(r"^\.TP\n(.*)", source, re.MULTILINE):
        assert tag.count("[") == tag.count("]"), tag


def test_the_page_and_the_reference_name_each_option_of_a_listener() -> None:
    listed = text_of("SocketProtector.8").partition("Options follow a question mark: ")[2]
    of_tcp, of_unix = re.split(r";\s+for a UNIX path\s+", listed.partition(".\n")[0])
    reference = FILES["SocketProtector.8"].parents[1] / "reference.md"
    described = reference.read_text(encoding="utf-8").partition("### Listener options\n")[2]
    tcp_table, unix_table = (
        re.findall(r"`(\w+)=", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
        for table in described.partition("\nThe start fails")[0].split("\n| UNIX path |")
    )

    assert re.split(r",\s+", of_tcp) == sorted({*tcp_table}) == sorted(socket_options.OPTIONS)
    assert {*re.split(r",\s+", of_unix)} == {*unix_table} == {*listen_spec.UNIX_OPTIONS}
