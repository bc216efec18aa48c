"""An error of the disk names its own cause and remedy."""

from __future__ import annotations

import errno
import os

import pytest

from xlstm_lm.base.durable_files import RunError, disk_errors_explained, replace_durably


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full; "),
        (errno.EDQUOT, "your quota of the disk is used up"),
        (errno.EACCES, "no permission to write /elsewhere: allow it, or choose another folder"),
        (errno.EROFS, "the disk can only be read"),
        (errno.ENAMETOOLONG, "the name is too long"),
        (errno.ENOENT, "/elsewhere is gone"),
        (errno.EFBIG, "the file is larger than the system allows"),
        (errno.ENXIO, "writing failed ([Errno 6] No such device or address: '/elsewhere'): remove the cause"),
    ],
)
def test_cause_and_remedy(number, said, tmp_path):
    path = tmp_path / "not" / "there"
    with pytest.raises(RunError) as stopped, disk_errors_explained(path):
        raise OSError(number, os.strerror(number), "/elsewhere")
    message = str(stopped.value)
    assert message.startswith(f"{path}: {said}")
    assert ("make room" in message) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert message.endswith("give the same command again. What was finished before, checkpoints included, is intact.")


def test_no_room_for_more_files(tmp_path, monkeypatch):
    full = os.statvfs_result((4096, 4096, 100, 50, 50, 10, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(RunError, match="the disk has room for no more files"), disk_errors_explained(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_that_cannot_be_replaced_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics.jsonl is a folder, where a file belongs: move it away"):
        replace_durably(tmp_path / "metrics.jsonl", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
