"""A program that reads a data set from a hub on loopback, driven line by line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.data.loopback_hub import LoopbackHub

# HF_ENDPOINT is read when huggingface_hub is imported, hence a process of its own: each input line is an expression,
# each output line its value.
PROGRAM = """
import itertools, json, logging, pickle, sys
logging.basicConfig()
from xlstm_lm.data import *
from xlstm_lm.data.sources import START, Piece, Position, hub_file, patience

def source_of(**fields):
    "A source that keeps nothing on the node unless told to: tests count what is fetched."
    return SourceConfig(**dict(kind="hub", dataset="org/texts", cache_gib=0) | fields)

def config_of(num_workers=0, lanes=2, **fields):
    source = source_of(**fields)
    settings = dict(context_length=64, global_batch_size=lanes, shuffle_documents=8, num_workers=num_workers)
    return DataConfig(sources=[source], **settings)

def open_stream(**fields):
    global stream
    config = config_of(**fields)
    stream = TrainingStream(config, build_tokenizer(config.tokenizer), lanes=range(2), seed=0)
    return stream.fingerprint()

def tokens_of_ranks(count, batches, **fields):
    "Rows of four lanes, read by so many ranks of which the first opens the data, as other processes get it."
    config = config_of(lanes=4, **fields)
    data = [DocumentData(config) for _ in range(count)]
    opened = []
    def on_first(action):
        opened[:] = opened or [pickle.dumps(action())]
        return pickle.loads(opened[0])
    for one in data:
        one.share(on_first, None, [])
    lanes = [range(rank * 4 // count, (rank + 1) * 4 // count) for rank in range(count)]
    streams = [one.stream(share, 0) for one, share in zip(data, lanes)]
    return [[row for each in streams for row in each.next_batch().tokens_BT.tolist()] for _ in range(batches)]

def open_one(**fields):
    global source
    source = open_source(source_of(**fields))

def read(first=START, **fields):
    "Records of the first shard of a source."
    open_one(**fields)
    return source.read([Piece(0)], Position(*first))

def tokens(count):
    return [stream.next_batch().tokens_BT.tolist() for _ in range(count)]

for line in sys.stdin:
    try:
        value = eval(line)
    except Exception as error:
        value = f"{type(error).__name__}: {error}"
    print(json.dumps(value), flush=True)
"""


class Asker:
    """A program that reads from the hub."""

    def __init__(self, hub: LoopbackHub, home: Path) -> None:
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": (home / "stderr").open("w")}
        self._process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, text=True, **pipes)

    def __call__(self, expression: str):
        print(expression, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def lanes_of(batches: list[list[list[int]]]) -> list[str]:
    """The text of each lane, with a null character where a document ends."""
    lanes = [[token % 256 for row in rows for token in row] for rows in zip(*batches)]
    return [bytes(lane).decode(errors="replace") for lane in lanes]
