"""make fleet-demo: what it says of each host while Ansible works."""

from __future__ import annotations

import re

from tests.fleet.demo import _STEPS, Play
from tests.fleet.hosts import DEPLOY

BAD = """\
PLAY [Release] *****************************************************************

TASK [socketprotector_release : Put the release beside the others] *************
changed: [host1]

TASK [socketprotector_release : Deploy it, and wait for the verdict] ***********
fatal: [host1]: FAILED! => changed=false
  rc: 3

TASK [socketprotector_release : Stop here, and say why] ************************
fatal: [host1]: FAILED! => changed=false
"""


def test_each_step_of_a_host_is_said_and_counted_once() -> None:
    play = Play()

    assert [news for each in BAD.splitlines() if (news := play.heard(each))] == [
        "host1 has the files",
        "host1 has not taken it",
    ]
    assert play.tried == {"host1"}


def test_a_host_where_there_is_nothing_to_do_has_tried_nothing() -> None:
    play = Play()
    play.heard("TASK [socketprotector_release : Deploy it, and wait for the verdict] ***")

    assert play.heard("ok: [host2]") == "host2 served it already"
    assert play.tried == set()


def test_the_playbook_has_each_task_that_is_listened_for() -> None:
    tasks = "".join(each.read_text() for each in DEPLOY.glob("ansible/roles/*/tasks/*.yml"))
    named = set(re.findall(r"- name: (.*)", tasks))

    assert {task for task, _ in _STEPS} <= named
