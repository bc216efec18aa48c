"""The ranks on the page about a run: a summary of any number, outliers by name, clocks that differ, damaged files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from xlstm_lm.runs.heartbeats import Heartbeat, read_heartbeats, remove_all_heartbeats, write_heartbeats
from xlstm_lm.runs.ranks_seen import NAMED, look_at_ranks, rank_lines

NOW = 1_800_000_000.0
PER_NODE = 8


def write_run(
    folder: Path, ranks: int, beats: dict[int, tuple[str, int, float]] | None = None, skew: float = 0
) -> Path:
    """Write the heartbeats of a run whose ranks are in step 100, two seconds ago.

    Args:
        folder: Folder of the run.
        ranks: Number of ranks, eight a node.
        beats: Phase, step and age in seconds of the ranks that differ.
        skew: Seconds by which the clock of each node is ahead of the one before.
    """
    (folder / "heartbeats").mkdir(parents=True)
    for first in range(0, ranks, PER_NODE):
        node = first // PER_NODE
        written = NOW - 1 + node * skew
        here = []
        for rank in range(first, min(first + PER_NODE, ranks)):
            phase, step, age = (beats or {}).get(rank, ("step", 100, 2.0))
            beaten = written + 1 - age
            here.append(Heartbeat(rank=rank, host=f"node{node}", pid=50 + rank, step=step, phase=phase, time=beaten))
        write_heartbeats(folder, f"node{node}_0", here)
        path = folder / "heartbeats" / f"node{node}_0.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"written": written}))
        os.utime(path, (NOW - 1, NOW - 1))
    return folder


def lines_of(folder: Path) -> list[str]:
    seen, problems = look_at_ranks(folder, NOW)
    assert not problems
    return rank_lines(seen)


def test_one_rank_has_one_line(tmp_path):
    assert lines_of(write_run(tmp_path, 1)) == [
        "  beat        rank 0 on node0, process 50: step after step 100, beat 2 s ago"
    ]
    assert lines_of(tmp_path / "nothing") == []


def test_four_ranks_are_summed_up_with_the_slowest(tmp_path):
    assert lines_of(write_run(tmp_path, 4, {2: ("step", 99, 7.0)})) == [
        "  ranks       4 on 1 host: 4 in step, after steps 99 to 100, newest beat 2 s ago",
        "  slowest     rank 2 on node0, process 52: step after step 99, beat 7 s ago",
    ]


def test_of_256_ranks_only_those_that_stand_out_are_named(tmp_path):
    beats = {17: ("save", 90, 200.0), 200: ("failed", 95, 3.0)}
    lines = lines_of(write_run(tmp_path, 256, beats, skew=1000.0))
    assert lines == [
        "  ranks       256 on 32 hosts: 254 in step, 1 in save, 1 in failed, after steps 90 to 100, "
        "newest beat 2 s ago",
        "  stands out  rank 200 on node25, process 250: failed after step 95, beat 3 s ago",
        "  stands out  rank 17 on node2, process 67: save after step 90, beat 3 min 20 s ago",
    ]


def test_many_outliers_are_counted(tmp_path):
    lines = lines_of(write_run(tmp_path, 256, dict.fromkeys(range(3, 20), ("step", 90, 200.0))))
    assert len(lines) == 1 + NAMED + 1 and lines[-1] == f"  stands out  and {17 - NAMED} more"


def test_where_all_wait_those_behind_stand_out(tmp_path):
    beats = {rank: ("step", 100, 300.0 + rank) for rank in range(16)}
    assert "slowest     rank 15 " in lines_of(write_run(tmp_path / "same", 16, beats))[1]
    behind = lines_of(write_run(tmp_path / "behind", 16, beats | {9: ("step", 99, 301.0)}))
    assert len(behind) == 2 and "stands out  rank 9 on node1" in behind[1]
    saving = lines_of(write_run(tmp_path / "phase", 16, dict.fromkeys(range(1, 16), ("save", 100, 300.0))))
    assert "stands out  rank 0 on node0" in saving[1], "the others wait for it in the save"


def test_a_silent_node_is_named_in_place_of_its_ranks(tmp_path):
    run = write_run(tmp_path, 24)
    os.utime(run / "heartbeats" / "node1_0.json", (NOW - 180, NOW - 180))
    lines = lines_of(run)
    assert len(lines) == 3 and "slowest" in lines[1]
    assert lines[2] == "  silent      node1_0, ranks 8 to 15: its monitor wrote 3 min 0 s ago"
    for path in (run / "heartbeats").iterdir():
        os.utime(path, (NOW - 180, NOW - 180))
    assert "no node writes any more" in lines_of(run)[0] and len(lines_of(run)) == 5


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        '{"ranks": []}',
        '{"written": 1.0, "ranks": [5]}',
        '{"written": 1.0, "ranks": [{"rank": 1}]}',
        '{"written": 1, "ranks": [{"rank": "1", "host": "a", "pid": 1, "step": 1, "phase": "step", "time": 1}]}',
        '{"written": 1, "ranks": [{"rank": 1, "host": "a", "pid": 1, "step": 1, "phase": "lost", "time": 1}]}',
    ],
)
def test_a_damaged_file_is_named_and_the_others_are_shown(tmp_path, damage):
    run = write_run(tmp_path, 16)
    (run / "heartbeats" / "node0_0.json").write_text(damage)
    seen, problems = look_at_ranks(run, NOW)
    assert [each.beat.rank for each in seen.ranks] == list(range(8, 16))
    assert len(problems) == 1 and "node0_0.json is damaged: " in problems[0] and "Delete it" in problems[0]
    with pytest.raises(ValueError, match=r"node0_0\.json is damaged"):
        read_heartbeats(run)


def test_a_node_that_ends_while_its_file_is_read_is_no_problem(tmp_path):
    run = write_run(tmp_path, 16)
    path = run / "heartbeats" / "node0_0.json"
    path.unlink()
    path.symlink_to(run / "gone")
    assert [each.rank for each in read_heartbeats(run)] == list(range(8, 16))


def test_heartbeats_that_a_lost_node_left_are_removed(tmp_path):
    run = write_run(tmp_path, 16)
    remove_all_heartbeats(run)
    remove_all_heartbeats(run)
    assert list(run.iterdir()) == []
