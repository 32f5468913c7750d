"""Releases as options: which one is started, where its path comes, and what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from socketprotector.launch import cli, release_choice
from socketprotector.launch.resolve import ParsedOptions
from socketprotector.model.errors import UsageError
from socketprotector.model.lazy_dataclass import replace
from socketprotector.model.settings import Settings, dump, load
from tests import needs
from tests.together import together

KEYS = 'listen = "127.0.0.1:0"\nreleases = "releases"\ncurrent = "live/current"\n'
COMMAND = 'command = ["{release}/daemon", "--data={release}/data"]\n'


class Web:
    """A folder with a configuration file and releases 1 and 2, of which `current` names 1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "web.toml"
        self.current = folder / "live" / "current"
        (folder / "live").mkdir()
        for name in ("1", "2"):
            self.release(name)
        self.current.symlink_to("../releases/1")

    def release(self, name: str) -> Path:
        made = self.folder / "releases" / name
        made.mkdir(parents=True)
        shutil.copy("/bin/true", made / "daemon")
        (made / "vars").write_text("A=1\n")
        return made

    def read(
        self, text: str = KEYS + COMMAND, *words: str, running: Settings | None = None
    ) -> ParsedOptions:
        self.path.write_text(text)
        found = cli.parse(["--config", str(self.path), *words], running)
        assert found is not None
        return found

    def refused(self, text: str = KEYS + COMMAND, *words: str) -> str:
        with pytest.raises(UsageError) as error:
            self.read(text, *words)
        return str(error.value).replace(f"{self.path} ", "").replace(str(self.folder), ".")


@pytest.fixture
def web(tmp_path: Path) -> Web:
    return Web(tmp_path)


def test_the_path_comes_everywhere_an_option_may_name_a_file(web: Web) -> None:
    more = (
        'chdir = "{release}"\nenv-file = "{release}/vars"\nready = "check:{release}/ready"\n'
        'health = "check:{release}/health"\nsettle = "1s"\nsettle-check = "{release}/settle"\n'
        '[env]\nPATH = "{release}/bin:/bin"\n'
    )

    settings = web.read(KEYS + COMMAND + more).settings

    path = f"{web.folder}/releases/1"
    assert settings.release == "1"
    assert settings.command == (f"{path}/daemon", f"--data={path}/data")
    assert (settings.directory, settings.env_file) == (path, f"{path}/vars")
    assert (settings.ready_check, settings.health) == (f"{path}/ready", f"check:{path}/health")
    assert settings.policy.settle_check == f"check:{path}/settle"
    assert settings.environment == (("PATH", f"{path}/bin:/bin"),)
    assert settings.origin.configured


@together("option", ["ready", "health", "settle-check"])
def test_a_path_that_no_probe_can_have_is_refused(option: str, tmp_path: Path) -> None:
    folder = tmp_path / f"my {option}"
    folder.mkdir()
    more = f'settle = "1s"\n{option} = "http:/x{{release}}"\n'

    refused = Web(folder).refused(KEYS + COMMAND + more)

    assert f"--{option} 'http:/x{{release}}' would become 'http:/x./releases/1': no" in refused


def test_a_release_s_name_does_not_change_what_a_probe_means(web: Web) -> None:
    for name in ("x=204", "x=999"):  # 999 is no status
        web.release(name)
    running = web.read().settings
    status = KEYS + COMMAND + 'health = "http:/x{release}"\n'
    host = KEYS + COMMAND + 'health = "http:/{release}"\n'

    found = web.read(status, running=replace(running, release_wanted="x=999")).settings
    assert found.health == f"http:/x{web.folder}/releases/x=999"
    for text, wanted in ((status, "x=204"), (host, "2")):
        with pytest.raises(UsageError, match="with another host or status"):
            web.read(text, running=replace(running, release_wanted=wanted))


def test_they_work_without_a_file_and_a_reload_reads_the_line_again(web: Web) -> None:
    words = ["--releases", str(web.folder / "releases"), "--current", str(web.current)]
    found = cli.parse([*words, "127.0.0.1:0", "--", "{release}/daemon"])

    assert found is not None
    assert found.settings.command == (f"{web.folder}/releases/1/daemon",)
    assert found.settings.origin.configured


def test_a_deploy_reads_for_its_release_and_a_reload_for_that_of_current(web: Web) -> None:
    running = web.read().settings

    deployed = web.read(running=replace(running, release_wanted="2")).settings
    web.current.unlink()
    web.current.symlink_to("../releases/2")
    reloaded = web.read(running=running).settings

    for each in (deployed, reloaded):
        assert (each.release, each.command[0]) == ("2", f"{web.folder}/releases/2/daemon")
        assert each.release_wanted == ""


def test_an_older_program_reads_settings_without_releases() -> None:
    plain = Settings(name="web", command=("x",), directory="/")
    assert b"release" not in dump(plain)
    used = replace(plain, releases="/r", current="/c", release="1")
    assert load(dump(used)) == used


def test_without_releases_the_placeholder_is_a_word_like_any_other(web: Web) -> None:
    text = 'listen = "127.0.0.1:0"\ncommand = ["/bin/true", "{release}"]\n'
    assert web.read(text).settings.command == ("/bin/true", "{release}")


@together(
    ("text", "said"),
    [
        (
            'listen = "127.0.0.1:0"\nreleases = "releases"\ncommand = ["{release}/daemon"]\n',
            "line 2: releases: --releases needs --current",
        ),
        (
            'listen = "127.0.0.1:0"\ncurrent = "live/current"\ncommand = ["/bin/true"]\n',
            "line 2: current: --current needs --releases",
        ),
        (
            'listen = "127.0.0.1:0"\ndeployer = "root"\ncommand = ["/bin/true"]\n',
            "--deployer needs --releases and --current",
        ),
        (
            KEYS + 'command = ["/bin/true"]\n',
            "line 2: releases: neither the command nor --chdir has {release}, so a deploy would "
            "change nothing",
        ),
        (
            KEYS + 'command = ["/bin/true"]\n[env]\nX = "{release}"\n',
            "line 2: releases: neither the command nor --chdir has {release}",
        ),
        (
            KEYS + 'command = ["live/current/daemon", "{release}"]\n',
            "the command ./live/current/daemon leads through ./live/current; use {release}",
        ),
        (
            KEYS + COMMAND + 'chdir = "live/current"\n',
            "--chdir ./live/current leads through ./live/current; use {release}",
        ),
        (
            KEYS + COMMAND + 'env-file = "live/../live/current/vars"\n',
            "--env-file ./live/../live/current/vars leads through ./live/current",
        ),
        (
            KEYS + COMMAND + 'deployer = "nosuchuser"\n',
            "line 5: deployer: nosuchuser: unknown user",
        ),
        (
            KEYS.replace("live/current", "releases/current") + COMMAND,
            "--current ./releases/current is inside --releases; choose another folder",
        ),
        (
            KEYS.replace("live/current", "live/nothing") + COMMAND,
            "releases: ./live/nothing: No such file or directory; make it once: ln -s "
            "./releases/NAME ./live/nothing",
        ),
    ],
)
def test_refusals(web: Web, text: str, said: str) -> None:
    refused = web.refused(text)
    assert said in refused
    assert "\n" not in refused


def test_a_slash_behind_the_link_changes_nothing(web: Web) -> None:
    read = web.read(KEYS.replace("live/current", "live/current/") + COMMAND)

    assert (read.settings.current, read.settings.release) == (str(web.current), "1")


def test_a_configuration_file_of_a_release_is_refused(web: Web) -> None:
    inside = web.folder / "releases" / "1" / "web.toml"
    for path, said in (
        (inside, "is inside"),
        (web.current / "web.toml", "leads through"),
    ):
        web.path = path
        text = KEYS.replace('"releases"', f'"{web.folder}/releases"')
        text = text.replace('"live/current"', f'"{web.current}"')
        assert said in web.refused(text + COMMAND)


def test_another_file_may_be_inside_a_release_because_a_deploy_does_not_change_it(web: Web) -> None:
    read = web.read(KEYS + COMMAND + 'env-file = "releases/1/vars"\n')

    assert read.settings.env_file == f"{web.folder}/releases/1/vars"


@pytest.mark.parametrize("target", ["live/current", "{folder}/live/../live/current", "again"])
def test_a_file_that_other_links_lead_through_current_is_refused(web: Web, target: str) -> None:
    (web.folder / "releases" / "1" / "vars").touch()
    (web.folder / "again").symlink_to("live/current")
    (web.folder / "etc").symlink_to(target.format(folder=web.folder))
    said = "--env-file ./etc/vars leads through ./live/current; use {release}"
    assert said in web.refused(KEYS + COMMAND + 'env-file = "etc/vars"\n')


def test_a_loop_of_links_is_refused_as_such(web: Web) -> None:
    (web.folder / "etc").symlink_to("etc")
    found = web.refused(KEYS + COMMAND + 'env-file = "etc/vars"\n')
    assert "Too many levels of symbolic links" in found


def test_a_release_that_is_no_folder_of_ours_is_refused_alone(web: Web) -> None:
    (web.folder / "releases" / "1").chmod(0o777)
    assert web.refused() == (
        "line 2: releases: ./releases/1 (drwxrwxrwx): other users can write it; chmod go-w "
        "./releases/1"
    )


def test_a_file_of_a_release_that_is_missing_is_named_by_its_path(web: Web) -> None:
    (web.folder / "releases" / "1" / "daemon").unlink()
    assert "cannot run ./releases/1/daemon: No such file" in web.refused()


@needs.ROOT
@together(
    ("owner", "words", "accepted"),
    [
        ("root", (), True),
        ("nobody", (), False),
        ("nobody", ("--deployer", "nobody"), True),
        ("daemon", ("--deployer", "nobody"), False),
        ("nobody", ("--user", "nobody"), False),  # its workers run as nobody
        ("nobody", ("--user", "nobody", "--worker-user", "daemon"), True),
        ("daemon", ("--user", "nobody", "--worker-user", "daemon"), False),
        ("root", ("--user", "nobody", "--worker-user", "daemon"), True),
    ],
)
def test_owners(web: Web, owner: str, words: tuple[str, ...], accepted: bool) -> None:
    for each in (web.folder, *web.folder.parents):
        if str(each) in ("/", "/tmp"):
            break
        each.chmod(0o755)
    shutil.chown(web.folder / "releases" / "1", owner)
    shutil.chown(web.folder / "live", "nobody")
    if accepted:
        assert web.read(KEYS + COMMAND, *words).settings.release == "1"
    else:
        assert "belongs to uid" in web.refused(KEYS + COMMAND, *words)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_no_other_user_may_replace_current(web: Web, mode: int) -> None:
    (web.folder / "live").chmod(mode)
    assert "line 3: current: ./live/current: other users can write ./live (" in web.refused()


@pytest.mark.parametrize("wanted", ["", "2"], ids=["reload", "deploy"])
def test_no_other_user_may_replace_current_after_a_reload(web: Web, wanted: str) -> None:
    running = replace(web.read().settings, release_wanted=wanted)
    (web.folder / "live").chmod(0o770)
    with pytest.raises(UsageError) as error:
        web.read(running=running)
    assert "other users can write " in str(error.value)
    assert str(error.value).endswith(f"(drwxrwx---); chmod go-w {web.folder}/live")


@needs.ROOT
def test_another_user_than_that_of_the_start_can_reload(web: Web) -> None:
    """Only a start checks whether the protector's user can move `current`."""
    running = web.read().settings
    for each in (web.folder, *web.folder.parents):
        if str(each) in ("/", "/tmp"):
            break
        each.chmod(0o755)
    words = ("--user", "nobody")
    assert web.read(KEYS + COMMAND, *words, running=running).settings.release == "1"


@needs.ROOT
def test_the_protectors_user_must_be_able_to_move_current(web: Web) -> None:
    for each in (web.folder, *web.folder.parents):
        if str(each) in ("/", "/tmp"):
            break
        each.chmod(0o755)
    assert (
        "line 3: current: ./live/current: user nobody cannot move it: ./live: Permission denied; "
        "give it a folder of its own, which that user may write"
    ) in web.refused(KEYS + COMMAND, "--user", "nobody")


def test_a_protector_without_root_accepts_its_own_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert release_choice.owners(None, None, None) == {0, 1000}
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert release_choice.owners(None, None, None) == {0}
