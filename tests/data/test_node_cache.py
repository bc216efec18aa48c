"""Bytes of the hub that the processes of a node share: fetched once, whatever dies, breaks or fills up meanwhile."""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest

from tests.data import loopback_hub
from tests.data.conftest import make_documents
from tests.data.loopback_hub import COMMIT, LoopbackHub
from tests.data.test_hub_at_scale import lines_of, parquet_of
from xlstm_lm.data.config import DataConfig
from xlstm_lm.data.lanes import DealtSource
from xlstm_lm.data.sources import START, Piece, Position, Record, SourceConfig, node_cache
from xlstm_lm.data.sources.fields import Fields
from xlstm_lm.data.sources.hub_file import FIRST_BLOCK_BYTES, HubFile
from xlstm_lm.data.sources.node_cache import Block, CachedFile
from xlstm_lm.data.sources.readers import Shard, read_lines, read_rows

MIB = 2**20
PROCESSES = 4
LATER = "f" * 40
fork = multiprocessing.get_context("fork")
TEXTS = make_documents(6000, 0, longest=400)
RANDOM = random.Random(0).randbytes(4 * MIB)
FILES = {
    "rows.parquet": parquet_of(TEXTS, 1000),
    "lines.jsonl": lines_of(TEXTS),
    "lines.jsonl.gz": gzip.compress(lines_of(TEXTS), compresslevel=1),
    "lines.jsonl.zst": pyarrow.compress(lines_of(TEXTS), "zstd", asbytes=True),
    "random.bin": RANDOM,
}


@pytest.fixture
def hub(node_folder: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub("org/texts", dict(FILES)) as running:
        yield running


@pytest.fixture
def cached(node_folder: Path) -> Callable[[], list[Path]]:
    """Gives the files with blocks, in the order of their first bytes."""
    return lambda: sorted((node_folder / "hub_blocks").glob("*/*"), key=lambda path: int(path.name.partition("-")[0]))


def address(hub: LoopbackHub, name: str, commit: str = COMMIT) -> str:
    return f"{hub.endpoint}/datasets/{hub.name}/resolve/{commit}/{name}"


def open_file(url: str, cache_mib: float = 1024) -> Any:
    """Open a file as a source on the hub does."""
    config = SourceConfig(kind="hub", dataset="org/texts", cache_gib=cache_mib / 1024)
    raw = HubFile(url, config, ahead=not url.endswith(".parquet"))
    return pyarrow.PythonFile(raw, mode="r") if url.endswith(".parquet") else io.BufferedReader(raw, FIRST_BLOCK_BYTES)


def records_of(url: str, cache_mib: float, first: Position, piece: Piece) -> Iterator[Record]:
    """Records of a file from a position on."""
    shard = Shard(0, url, url, piece, first, opener=lambda: open_file(url, cache_mib), is_fixed=True)
    fields = Fields.of(SourceConfig(kind="hub", dataset="org/texts"))
    return (read_rows if url.endswith(".parquet") else read_lines)([shard], fields, 2, True)


def texts_of(url: str, cache_mib: float = 1024, part: int = 0, parts: int = 1) -> list[str]:
    """Texts of one of the lanes that share a file."""
    return [each.text for each in records_of(url, cache_mib, START._replace(checksum=None), Piece(0, part, parts))]


def texts_of_processes(url: str, cache_mib: float = 1024) -> list[str]:
    """Texts of a file, of which several processes at a time each read a lane."""
    with fork.Pool(PROCESSES) as pool:
        work = [(url, cache_mib, part, PROCESSES) for part in range(PROCESSES)]
        lanes = pool.starmap(texts_of, work, chunksize=1)
    texts = [""] * sum(map(len, lanes))
    for part, lane in enumerate(lanes):
        texts[part::PROCESSES] = lane
    return texts


@pytest.mark.parametrize("name", ["rows.parquet", "lines.jsonl", "lines.jsonl.gz", "lines.jsonl.zst"])
def test_four_processes_fetch_each_byte_once_and_a_restart_none(name, hub):
    url = address(hub, name)
    assert texts_of(url, cache_mib=0) == TEXTS
    alone, requests = hub.bytes_served[name], len(hub.requests)
    assert texts_of_processes(url, cache_mib=0) == TEXTS
    assert hub.bytes_served[name] == (1 + PROCESSES) * alone and len(hub.requests) == (1 + PROCESSES) * requests
    hub.bytes_served.clear()
    assert texts_of_processes(url) == TEXTS
    size = len(FILES[name])
    assert size * 0.9 < hub.bytes_served[name] <= size
    assert name.endswith(".parquet") or hub.bytes_served[name] == size
    hub.bytes_served.clear()
    assert texts_of(url) == TEXTS
    assert not hub.bytes_served


def test_a_file_held_in_part_is_fetched_for_the_rest(hub, cached):
    url = address(hub, "lines.jsonl.gz")
    assert texts_of(url) == TEXTS
    middle = cached()[1]
    missing = middle.stat().st_size
    middle.unlink()
    hub.bytes_served.clear()
    assert texts_of(url) == TEXTS
    assert hub.bytes_served["lines.jsonl.gz"] == missing < len(FILES["lines.jsonl.gz"]) / 2


def test_readers_that_begin_anywhere_use_what_others_have_fetched(hub):
    generator = random.Random(1)
    for _ in range(30):
        begin = generator.randrange(len(RANDOM))
        file = open_file(address(hub, "random.bin"))
        file.seek(begin)
        assert file.read(300_000) == RANDOM[begin : begin + 300_000]
    assert open_file(address(hub, "random.bin")).read() == RANDOM
    assert hub.bytes_served["random.bin"] == len(RANDOM)


@pytest.mark.parametrize("name", ["rows.parquet", "lines.jsonl"])
def test_a_restart_on_another_node_fetches_no_more_than_without_a_cache(name, hub):
    row = 4500
    offset = sum(len(line) for line in lines_of(TEXTS).splitlines(keepends=True)[:row])
    served = []
    for cache_mib in (0, 1024):
        hub.bytes_served.clear()
        first = START._replace(document=row, turn=row, checksum=None, offset=offset)
        assert next(records_of(address(hub, name), cache_mib, first, Piece(0))).text == TEXTS[row]
        served.append(hub.bytes_served[name])
    assert 0 < served[1] <= served[0] < len(FILES[name]) / 2


@pytest.mark.parametrize("damage", ["cut", "altered", "emptied"])
def test_a_damaged_block_is_fetched_again(damage, hub, cached):
    url = address(hub, "lines.jsonl.zst")
    assert texts_of(url) == TEXTS
    damaged = cached()[1]
    content = damaged.read_bytes()
    changed = {"cut": content[:-1], "altered": content[:9] + bytes([content[9] ^ 1]) + content[10:], "emptied": b""}
    damaged.write_bytes(changed[damage])
    hub.bytes_served.clear()
    assert texts_of_processes(url) == TEXTS
    assert hub.bytes_served["lines.jsonl.zst"] == len(content)
    assert damaged.read_bytes() == content


def test_a_damaged_block_is_removed_also_where_it_is_not_read_from_its_begin(hub, cached):
    url = address(hub, "random.bin")
    assert open_file(url).read() == RANDOM
    damaged = cached()[-1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    file = open_file(url)
    file.seek(-9, io.SEEK_END)
    assert file.read() == RANDOM[-9:]
    assert not damaged.exists()


def test_files_of_one_name_do_not_mix(hub):
    """Those of another data set, and of another commit."""
    assert open_file(address(hub, "random.bin")).read() == RANDOM
    hub.files["random.bin"] = RANDOM[::-1]
    assert open_file(address(hub, "random.bin", LATER)).read() == RANDOM[::-1]
    hub.name, hub.files["random.bin"] = "org/others", RANDOM[:MIB]
    assert open_file(address(hub, "random.bin")).read() == RANDOM[:MIB]
    hub.name = "org/texts"
    assert open_file(address(hub, "random.bin")).read() == RANDOM


def in_a_process(url: str) -> multiprocessing.process.BaseProcess:
    process = fork.Process(target=lambda: os._exit(open_file(url).read() != RANDOM))
    process.start()
    return process


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_where_a_process_is_killed_or_suspended_while_it_fetches_another_goes_on(how, hub, monkeypatch):
    monkeypatch.setattr(loopback_hub, "SILENCE_SECONDS", 30)
    if how == signal.SIGSTOP:
        monkeypatch.setattr(node_cache, "LONGEST_WAIT_SECONDS", 2.0)
    url = address(hub, "random.bin")
    hub.fault, hub.faults = "silent", 1
    first = in_a_process(url)
    wait_until(lambda: bool(hub.requests))
    second = in_a_process(url)
    try:
        time.sleep(0.5)
        assert len(hub.requests) == 1, "the second process waits for the first"
        assert first.pid is not None
        os.kill(first.pid, how)
        second.join(20)
        assert second.exitcode == 0
    finally:
        for process in (first, second):
            process.kill()
            process.join()
    assert open_file(url).read() == RANDOM


def test_what_a_killed_process_has_half_written_is_no_block_and_goes_first(hub, cached):
    url = address(hub, "random.bin")
    open_file(url).read(10)
    half = cached()[0].with_name(".tmp-65536-4194304-4194304-00000000")
    half.write_bytes(bytes(MIB))
    os.utime(half, (0, 0))
    (half.parents[1] / "bytes").unlink()
    assert open_file(url, cache_mib=2).read() == RANDOM
    assert not half.exists()


def size_of(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def test_blocks_keep_below_the_limit_and_those_read_last_stay(node_folder, cached):
    size = 100_000
    fetched: list[int] = []

    def fetch(begin: int, end: int) -> Block:
        fetched.append(begin)
        return Block(begin, RANDOM[begin:end], len(RANDOM))

    node_folder.mkdir(mode=0o700)
    file = CachedFile("address", MIB)
    for begin in range(0, 40 * size, size):
        assert file.block(begin, begin + size, fetch).content == RANDOM[begin : begin + size]
        file.block(0, size, fetch)
        assert size_of(cached()) <= MIB
    assert fetched == list(range(0, 40 * size, size)), "the block that is read again and again is never removed"
    assert size_of(cached()) > MIB / 2
    file.block(size, 2 * size, fetch)
    assert fetched[-1] == size


def test_the_limit_holds_for_all_processes_and_files_together(hub, cached, monkeypatch):
    write = node_cache.replace_durably
    seen = fork.Value("q", 0)

    def write_slowly(path: Path, content: bytes) -> None:
        time.sleep(0.05)  # without a lock, others write meanwhile
        write(path, content)
        with contextlib.suppress(FileNotFoundError):
            seen.value = max(seen.value, size_of(cached()))

    monkeypatch.setattr(node_cache, "replace_durably", write_slowly)
    with fork.Pool(PROCESSES) as pool:
        work = [(address(hub, "lines.jsonl", f"{number:040}"), 2) for number in range(2 * PROCESSES)]
        assert pool.starmap(texts_of, work, chunksize=1) == [TEXTS] * len(work)
    assert MIB < seen.value <= 2 * MIB
    folders = [path for path in cached()[0].parents[1].iterdir() if path.is_dir()]
    assert len(folders) == len({path.parent for path in cached()}) < len(work), "those without blocks are removed"


def test_blocks_take_half_of_a_disk_at_most(hub, cached, monkeypatch):
    disk = 3 * MIB
    monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=disk - size_of(cached())))
    assert open_file(address(hub, "random.bin")).read() == RANDOM
    assert MIB / 4 < size_of(cached()) <= disk / 2


@pytest.fixture
def warnings(caplog) -> Callable[[], list[str]]:
    node_cache.announce_once.cache_clear()
    caplog.set_level(logging.WARNING, "xlstm_lm")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_folder_that_can_only_be_read_is_announced_once_and_read(hub, node_folder, warnings):
    url = address(hub, "random.bin")
    open_file(url).read(MIB)
    known = hub.bytes_served["random.bin"]
    folder = str(node_folder / "hub_blocks")
    for words in (["--bind", folder, folder], ["-o", "remount,bind,ro", folder]):
        mounted = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    try:
        assert [open_file(url).read() for _ in range(2)] == [RANDOM] * 2
        assert texts_of(address(hub, "lines.jsonl")) == TEXTS
    finally:
        subprocess.run(["umount", folder], check=True)
    assert hub.bytes_served["random.bin"] == known + 2 * (len(RANDOM) - known)
    (message,) = warnings()
    assert message.startswith("bytes from the hub are not kept") and "Read-only file system" in message


def test_a_block_that_is_too_large_is_announced_once(hub, cached, warnings):
    assert open_file(address(hub, "random.bin"), cache_mib=0.5).read() == RANDOM
    assert [size_of([path]) for path in cached()] == [2**16, 2**18]
    (message,) = warnings()
    assert message.endswith("a block is larger than the space that it may take")


def test_a_file_in_place_of_the_folder_is_announced_once(hub, node_folder, warnings):
    node_folder.mkdir(mode=0o700)
    (node_folder / "hub_blocks").write_text("")
    assert open_file(address(hub, "random.bin")).read() == RANDOM
    assert len(warnings()) == 1 and str(node_folder / "hub_blocks") in warnings()[0]


def times_read(readers: int) -> float:
    """How often 512 lanes over 14 files read each file, with so many readers of which each reads a file once."""
    source: Any = SimpleNamespace(num_shards=14, config=SourceConfig(kind="hub", dataset="org/texts"), order=2)
    pieces = DealtSource(source, DataConfig(global_batch_size=512), 0, 0).deal(0)
    lanes = 512 // readers
    groups = [pieces[first : first + lanes] for first in range(0, 512, lanes)]
    return sum(len({piece.shard for (piece,) in group}) for group in groups) / 14


@pytest.mark.parametrize(
    ("gpus", "by_process", "by_node"), [(8, 8, 1), (64, 36.6, 8), (256, 36.6, 32), (512, 36.6, 36.6)]
)
def test_the_example_of_the_page_on_data(gpus, by_process, by_node):
    """Nodes of 8 GPUs."""
    assert [round(times_read(readers), 1) for readers in (gpus, gpus // 8)] == [by_process, by_node]
