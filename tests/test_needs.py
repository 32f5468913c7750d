"""Every skip names a need, so that the summary of a run can count it."""

from __future__ import annotations

import ast
from pathlib import Path

from tests import needs

HERE = Path(__file__).parent
OWN_WAYS = {"pytest.skip", "pytest.mark.skip", "pytest.mark.skipif", "pytest.importorskip"}


def test_no_other_module_skips() -> None:
    found = [
        f"{path.relative_to(HERE)}:{node.lineno}"
        for path in HERE.rglob("*.py")
        if path != Path(needs.__file__)
        if any(f"{way}(" in (text := path.read_text(encoding="utf-8")) for way in OWN_WAYS)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in OWN_WAYS
    ]

    assert found == []


def test_a_path_is_reachable_if_every_user_may_enter_each_folder(tmp_path: Path) -> None:
    file = tmp_path / "closed" / "file"
    file.parent.mkdir()
    for each in tmp_path.parents:
        if each.stat().st_uid == tmp_path.stat().st_uid and str(each) > "/tmp":
            each.chmod(each.stat().st_mode | 0o011)
    tmp_path.chmod(0o711)

    file.parent.chmod(0o711)
    assert needs.is_reachable(file)
    file.parent.chmod(0o700)
    assert not needs.is_reachable(file)
    assert needs.is_reachable(file.parent)


def test_a_reason_begins_with_the_need_by_which_it_is_counted() -> None:
    assert needs.reason("root") == "needs root"
    assert needs.reason("mounts", OSError(1, "no")) == "needs mounts: [Errno 1] no"
