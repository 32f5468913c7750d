"""Each file of deploy/ is understood by the tool that it is for; what says the same says it twice.

Those tools that a distribution has are run by `make test`, the others by `make test-fleet`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import needs
from tests.fleet.hosts import DEPLOY, TOOLS
from tests.nginx import own_folders
from tests.running import ROOT, output_of

KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
ANSIBLE = DEPLOY / "ansible"
WORKLOADS = """
import json, sys, yaml
found = [each for path in sys.argv[1:] for each in yaml.safe_load_all(open(path))]
print(json.dumps([each["spec"]["template"]["spec"] for each in found if each["kind"] != "Service"]))
"""
#: What belongs in a Nomad job that is released as docs/fleet.md says.
JOB = """
import json, sys, hcl2
print(json.dumps(hcl2.load(open(sys.argv[1]))))
"""


def tool(name: str) -> pytest.MarkDecorator:
    there = (TOOLS / name).exists() or shutil.which(name) is not None
    return needs.unless(bool(there), name)


def run(program: str, *words: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run one of the tools, which succeeds; return what it says."""
    path = f"{TOOLS}:{os.environ['PATH']}:/usr/sbin"
    found = shutil.which(program, path=path)
    return output_of(str(found), *words, cwd=cwd, PATH=path, **environment)


@tool("haproxy")
def test_haproxy_understands_its_file() -> None:
    assert "Configuration file is valid" in run("haproxy", "-c", "-V", "-f", DEPLOY / "haproxy.cfg")


@tool("nginx")
def test_nginx_understands_its_file(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    text = (DEPLOY / "nginx.conf").read_text()
    # Without the log that it would open and the port that it would bind, where only root may.
    for ours, anyones in (
        ("http {", f"http {{ access_log off; {own_folders(tmp_path)}"),
        ("listen 80;", "listen unix:s;"),
    ):
        assert ours in text
        text = text.replace(ours, anyones)
    file = tmp_path / "nginx.conf"
    file.write_text(text)
    said = run("nginx", "-t", "-p", tmp_path, "-c", file, "-g", "pid nginx.pid;")

    assert "test is successful" in said


def test_the_balancer_and_the_inventory_have_the_same_hosts() -> None:
    servers = re.findall(r"server (\w+) ([\d.]+):", (DEPLOY / "haproxy.cfg").read_text())
    hosts = re.findall(
        r"(\w+): \{ansible_host: ([\d.]+)\}", (ANSIBLE / "inventory.yml").read_text()
    )

    assert servers == hosts


@pytest.mark.costly
@tool("ansible-lint")
def test_ansible_lint_finds_nothing(tmp_path: Path) -> None:
    said = run("ansible-lint", "--offline", "--profile", "production", cwd=ANSIBLE,
               ANSIBLE_HOME=str(tmp_path))  # fmt: skip

    assert "0 failure(s), 0 warning(s)" in said


@pytest.mark.costly
@tool("ansible-playbook")
def test_ansible_understands_the_playbook(tmp_path: Path) -> None:
    words = ("ansible-playbook", "-i", "inventory.yml", "release.yml", "--syntax-check")

    assert "playbook: release.yml" in run(*words, cwd=ANSIBLE, ANSIBLE_HOME=str(tmp_path))


@pytest.mark.costly
@tool("ansible-playbook")
@pytest.mark.parametrize(
    ("locked", "words"),
    [("no", ("-e", "version=1")), ("yes", ()), ("yes", ("-e", "version=../1"))],
)
def test_a_release_without_its_lock_or_a_version_is_refused(
    locked: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    environment = {"RELEASE_LOCKED": locked, "ANSIBLE_HOME": str(tmp_path)}
    done = subprocess.run(
        [TOOLS / "ansible-playbook", "-i", "inventory.yml", "release.yml", *words],
        cwd=ANSIBLE,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert "start it as: ./release -e version=VERSION" in done.stdout
    assert "host1" not in done.stdout


@pytest.mark.parametrize(
    ("words", "folder"), [([ANSIBLE / "release"], Path("/")), (["sh", "release"], ANSIBLE)]
)
def test_a_release_uses_the_files_beside_it_wherever_it_is_started(
    words: list[str | Path], folder: Path, tmp_path: Path
) -> None:
    playbook = tmp_path / "ansible-playbook"
    playbook.write_text('#!/bin/sh\necho "$ANSIBLE_CONFIG" "$@"\n')
    playbook.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RELEASE_LOCK": str(tmp_path)}

    said = output_of(*words, "-e", "version=2", cwd=folder, **environment)

    beside = [str(ANSIBLE / name) for name in ("ansible.cfg", "inventory.yml", "release.yml")]
    config, inventory, play = beside
    assert said.split() == [config, "-i", inventory, play, "-e", "version=2"]


@pytest.mark.costly
@tool("kubernetes-validate")
def test_kubernetes_understands_its_files() -> None:
    said = run("kubernetes-validate", "--strict", *KUBERNETES)

    assert said.count(" passed for resource ") == 3


@pytest.mark.costly
@tool("kubernetes-validate")
def test_a_pod_is_given_more_time_than_its_stop_takes() -> None:
    pods = json.loads(run("python3", "-c", WORKLOADS, *KUBERNETES))

    assert len(pods) == 2
    for pod in pods:
        command = pod["containers"][0]["command"]
        given = dict(itertools.pairwise(command))
        limits = ("--lame-duck", "--stop-timeout", "--kill-timeout")
        needed_s = sum(int(given[each].removesuffix("s")) for each in limits)
        assert pod["terminationGracePeriodSeconds"] > needed_s


@pytest.mark.costly
@tool("hcl2tojson")
def test_the_nomad_job_parses_and_goes_back_by_itself() -> None:
    [job] = json.loads(run("python3", "-c", JOB, DEPLOY / "nomad" / "web.nomad.hcl"))["job"]
    [[update], [group]] = [next(iter(job.values()))[each] for each in ("update", "group")]

    assert (update["canary"], update["auto_revert"]) == (1, True)
    assert next(iter(group.values()))["shutdown_delay"].strip('"') == "2s"
