"""The node's folder for caches: where it is, and who may write to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from xlstm_lm.base import node_folder as module
from xlstm_lm.base.node_folder import node_local_folder


def test_the_folder_is_this_users_alone(node_folder: Path) -> None:
    assert node_local_folder() == node_folder
    assert node_folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file"])
def test_a_folder_that_others_could_write_to_is_not_used(
    node_folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "announce_once", said.append)
    if kind == "open to others":
        node_folder.mkdir()
        node_folder.chmod(0o777)
    elif kind == "a link":
        (node_folder.parent / "elsewhere").mkdir(mode=0o700)
        node_folder.symlink_to(node_folder.parent / "elsewhere")
    else:
        node_folder.write_text("")
    assert node_local_folder() is None
    assert str(node_folder) in said[0]
