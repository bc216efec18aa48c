"""Many readers of one data set on the hub: few requests, few bytes after a restart, and the same order under faults."""

from __future__ import annotations

import gzip
import io
import json
import random
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.asker import Asker
from tests.data.conftest import make_documents
from tests.data.loopback_hub import LoopbackHub

FOOTER_BYTES = 2**16
BLOCK_BYTES = 2**16
ROWS, ROWS_OF_GROUP = 400, 50


def parquet_of(texts: list[str], row_group_size: int) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file, row_group_size=row_group_size, compression="none")
    return file.getvalue()


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def long_texts():
    generator = random.Random(0)
    return [f"{number} {generator.randbytes(1500).hex()}" for number in range(ROWS)]


@pytest.fixture(scope="module")
def hub(long_texts):
    files = {f"lines/{number}.jsonl": lines_of(make_documents(60, number)) for number in range(3)}
    files["lines/3.jsonl.gz"] = gzip.compress(lines_of(make_documents(60, 3)))
    files |= {f"rows/{number}.parquet": parquet_of(make_documents(60, 9 + number), 7) for number in range(4)}
    files |= {"long/0.jsonl": lines_of(long_texts), "long/0.parquet": parquet_of(long_texts, ROWS_OF_GROUP)}
    blank = lines_of(make_documents(40, 30)).replace(b"\n", b"\n\n \n")
    files |= {"blank/0.jsonl": blank, "array/0.json": json.dumps([{"text": text} for text in "abc"]).encode()}
    with LoopbackHub("org/texts", files) as running:
        yield running


@pytest.fixture(scope="module")
def ask(hub, tmp_path_factory):
    asker = Asker(hub, tmp_path_factory.mktemp("hf_home"))
    asker("[setattr(patience, 'FIRST_PAUSE_SECONDS', 0.01), setattr(patience, 'LONGEST_PAUSE_SECONDS', 0.05)]")
    asker("setattr(hub_file, 'SILENCE_SECONDS', 0.2)")
    yield asker
    asker.close()


@pytest.mark.parametrize("files", ["lines", "rows"])
def test_requests_of_a_start_do_not_grow_with_the_ranks(files, hub, ask):
    """The interface of the hub, which is limited most, is asked by the first rank alone; every rank fetches files."""
    rows, requests = {}, {}
    ask(f"tokens_of_ranks(1, 1, data_files=['{files}/*'])")  # what a process finds out once
    for ranks in (1, 2, 4):
        before = len(hub.requests)
        rows[ranks] = ask(f"tokens_of_ranks({ranks}, 20, data_files=['{files}/*'])")
        requests[ranks] = hub.requests[before:]
    assert rows[1] == rows[2] == rows[4] and len(rows[1][0]) == 4
    interface = {ranks: [each for each in made if "/api/" in each] for ranks, made in requests.items()}
    assert 0 < len(interface[1]) == len(interface[2]) == len(interface[4])
    # Each lane fetches the one file that it reads, whichever rank the lane belongs to.
    assert len(requests[1]) == len(requests[2]) == len(requests[4])


def test_two_lanes_of_a_process_fetch_their_file_once(hub, ask):
    size = len(hub.files["long/0.jsonl"])
    ask("open_stream(data_files=['long/*.jsonl'])")
    opened = hub.bytes_served["long/0.jsonl"]
    ask(f"tokens({size // (3 * 64)})")  # about two thirds of the file for both lanes
    assert size / 2 < hub.bytes_served["long/0.jsonl"] - opened <= 1.1 * size


@pytest.mark.parametrize("files", ["lines", "rows"])
def test_faults_on_the_way_leave_the_order_as_it_is(files, hub, ask):
    assert ask(f"open_stream(data_files=['{files}/*'])")["sources"][0]["files"] == 4
    start = ask("stream.state_dict()")
    whole = ask("tokens(100)")  # more than a file for each lane
    for fault in ("reset", "cut", "silent", "429", "503"):
        ask(f"stream.load_state_dict({start})")
        hub.fault, hub.faults = fault, 1 if fault.isdigit() else 2
        begin = time.monotonic()
        assert ask("tokens(100)") == whole, fault
        assert hub.faults == 0, fault
        if fault.isdigit():  # with Retry-After: 1
            assert time.monotonic() - begin >= 1, fault


def test_a_restart_fetches_one_row_group_and_the_footer(hub, ask, long_texts):
    row = 330
    records = ask(f"list(itertools.islice(read(data_files=['long/*.parquet']), {row + 1}))")
    before = hub.bytes_served["long/0.parquet"]
    ask("open_one(data_files=['long/*.parquet'])")
    opened = hub.bytes_served["long/0.parquet"]
    assert ask(f"next(source.read([Piece(0)], Position(0, {row}, {row}, None)))") == records[row]
    group = (
        pq.ParquetFile(io.BytesIO(hub.files["long/0.parquet"])).metadata.row_group(row // ROWS_OF_GROUP).total_byte_size
    )
    assert 0 < opened - before < len(hub.files["long/0.parquet"]) / 4
    assert 0 < hub.bytes_served["long/0.parquet"] - opened <= group + FOOTER_BYTES + 1


def test_a_restart_fetches_the_line_that_comes_next(hub, ask):
    row = 330
    records = ask(f"list(itertools.islice(read(data_files=['long/*.jsonl']), {row + 1}))")
    ask("open_one(data_files=['long/*.jsonl'])")
    before = hub.bytes_served["long/0.jsonl"]
    end = [0, row, row, None, records[row - 1][7]]
    assert ask(f"next(source.read([Piece(0)], Position(*{end})))") == records[row]
    assert 0 < hub.bytes_served["long/0.jsonl"] - before <= 2 * BLOCK_BYTES < len(hub.files["long/0.jsonl"]) / 8


@pytest.mark.parametrize("files", ["lines/0.jsonl", "lines/3.jsonl.gz", "rows/0.parquet", "blank/0.jsonl"])
def test_positions_of_older_checkpoints_count_documents(files, ask):
    """They have no offset, and on the hub the checksum 0; blank lines did not count."""
    whole = ask(f"list(read(data_files=['{files}']))")
    assert [record[1] for record in whole] == list(range(len(whole))) and len(whole) in (40, 60)
    assert ask(f"list(read([0, 25, 25, 0, None], data_files=['{files}']))") == whole[25:]


def test_an_array_in_one_file_is_read_through_datasets(ask):
    assert [record[2] for record in ask("list(read(data_files=['array/*']))")] == ["a", "b", "c"]
