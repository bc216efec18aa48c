"""Turning the documents of a data section into files of token ids, in many processes, and again after an interruption.

A source of lines or rows becomes one file of ids a shard. Every document has its number there, so a run reads it in the
order in which it would read the source, unless documents are cut into pieces. Files of one document each are put
together in files of about `GROUP_BYTES`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_lm.base.durable_files import disk_errors_explained, replace_durably
from xlstm_lm.base.read_files import read_json
from xlstm_lm.base.recipe import to_yaml
from xlstm_lm.data.config import DataConfig
from xlstm_lm.data.documents import chat_identity, check_templates, documents
from xlstm_lm.data.duplicates import leave_out_duplicates
from xlstm_lm.data.opened import Opened, open_sources
from xlstm_lm.data.sources import KINDS, Piece, Record, Source
from xlstm_lm.data.sources.tokens import DESCRIPTION
from xlstm_lm.data.token_files import TokenFile, id_type, write_index
from xlstm_lm.data.token_statistics import Counts, Statistics, summarize
from xlstm_lm.data.tokenizer import Tokenizer, build_tokenizer

GROUP_BYTES = 2**28
BATCH_CHARACTERS = 2**20
"""Characters that are encoded at a time; the library needs some hundred bytes of memory for each."""
DATA_RECIPE = "data.yaml"
Report = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One file of ids to be written."""

    source: Source
    shards: list[int]
    """Shards of the source whose documents it holds."""
    path: Path
    limit: int | None
    """Tokens after which it ends, ends of documents counted; None for all documents."""
    keeps_numbers: bool
    """Whether each document has its number within the shard, so blank and bad ones are empty."""
    piece_characters: int | None = None
    """Characters of the pieces that documents are cut into; None for whole documents."""


def tokenize(
    config: DataConfig,
    out: Path,
    *,
    processes: int,
    deduplicate: bool = False,
    piece_characters: int | None = None,
    report: Report = lambda line: None,
) -> dict[str, Statistics]:
    """Write the training and validation documents of a data section as token ids.

    Files that an earlier call has completed are kept. `out` then has a folder for each source, the tokenizer, and
    data.yaml, a recipe that reads them in place of the documents.

    Args:
        config: Data section.
        out: Folder to write to.
        processes: Number of processes, each of which writes one file at a time.
        deduplicate: Whether to leave out each document whose text an earlier one of the same source has.
        piece_characters: Characters of the pieces into which training documents are cut at ends of lines, each a
            document from there on; None for whole documents. Held-out documents and chats stay whole.
        report: Receives a line as each file is complete.

    Returns:
        Statistics of each source by the name of its folder.

    Raises:
        ValueError: The folder holds ids of other documents or of another tokenizer, the tokenizer has no
            template for chats, or a document is bad.
        ConnectionError: The hub does not answer.
        RunError: A file cannot be written.
    """
    tokenizer = build_tokenizer(config.tokenizer)
    check_templates((*config.sources, *config.validation), tokenizer)
    opened = open_sources(config)
    jobs: dict[str, list[Job]] = {}
    for name, source, limit in _named(opened, config):
        jobs[name] = _jobs(source, out / name, limit, piece_characters)
        _describe(jobs[name], tokenizer, deduplicate)
    waiting = [job for group in jobs.values() for job in group if not _is_complete(job.path)]
    done = sum(map(len, jobs.values())) - len(waiting)
    total = done + len(waiting)
    if done:
        report(f"{done} of {total} files are complete already")
    for path, counts in _run(waiting, tokenizer, processes):
        done += 1
        report(f"{done}/{total} {path}: {counts.documents:,} documents, {counts.tokens:,} tokens")
    _write_recipe(config, tokenizer, jobs, out)
    statistics = {}
    for name, group in jobs.items():
        paths = [job.path for job in group]
        found = [Counts.load(path) for path in paths]
        if deduplicate:
            leave_out_duplicates(paths, found)
        statistics[name] = summarize(paths, tokenizer, found)
    for name, each in statistics.items():
        replace_durably(out / name / "statistics.json", json.dumps(asdict(each), indent=2).encode())
    return statistics


def _named(opened: Opened, config: DataConfig) -> Iterator[tuple[str, Source, int | None]]:
    for number, source in enumerate(opened.sources):
        yield f"sources-{number}", source, None
    for number, source in enumerate(opened.validation):
        yield f"validation-{number}", source, config.validation_tokens


def _jobs(source: Source, folder: Path, limit: int | None, piece_characters: int | None) -> list[Job]:
    """The files of ids of a source; validation documents, up to their limit, are one file and stay whole."""
    one_a_file = KINDS[source.config.kind].one_document_a_file
    shards = range(source.num_shards)
    if limit is not None:
        groups = [list(shards)]
    elif one_a_file:
        groups = _groups(source.shard_sizes)
    else:
        groups = [[shard] for shard in shards]
    pieces = piece_characters if limit is None else None
    keeps = limit is None and not one_a_file and pieces is None
    return [
        Job(source, group, folder / f"{number:06}.bin", limit, keeps, pieces) for number, group in enumerate(groups)
    ]


def _groups(sizes: list[int]) -> list[list[int]]:
    """Consecutive shards of about `GROUP_BYTES` together."""
    groups: list[list[int]] = [[]]
    size = 0
    for shard, more in enumerate(sizes):
        if size >= GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += more
    return groups


def _describe(jobs: list[Job], tokenizer: Tokenizer, deduplicate: bool) -> None:
    """Write what a folder of ids is made from, or compare it with what an earlier call has written.

    Raises:
        ValueError: the folder holds other ids.
    """
    source, path = jobs[0].source, jobs[0].path.parent / DESCRIPTION
    value = {
        "tokenizer": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "limit": jobs[0].limit,
        "deduplicate": deduplicate,
        "piece_characters": jobs[0].piece_characters,
        "source": json.loads(json.dumps(source.identity() | chat_identity(source.config, tokenizer))),
        "shard_sizes": {job.path.name: sum(source.shard_sizes[shard] for shard in job.shards) for job in jobs},
    }
    if path.exists():
        before = read_json(path)
        different = [name for name in value if before.get(name) != value[name]]
        if different:
            raise ValueError(
                f"{path.parent} holds token ids made with another {', '.join(different)}: choose another --out, or "
                "delete that folder to tokenize again"
            )
        return
    with disk_errors_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, json.dumps(value, indent=2).encode())


def _is_complete(path: Path) -> bool:
    with suppress(OSError):
        TokenFile(path)
        return Counts.path(path).exists()
    return False


def _run(jobs: list[Job], tokenizer: Tokenizer, processes: int) -> Iterator[tuple[Path, Counts]]:
    """Do the jobs; gives each file as it is complete."""
    if processes == 1 or len(jobs) <= 1:
        for job in jobs:
            yield job.path, write_job(job, tokenizer)
        return
    count = min(processes, len(jobs))
    # Threads of the library's own are of use only where there are fewer files than processors.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(max(1, processes // count))
    context = multiprocessing.get_context("spawn")  # the parent has threads, which a fork does not copy
    with ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(tokenizer,)) as pool:
        futures = {pool.submit(_write, job): job.path for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_tokenizer: Tokenizer
"""Tokenizer of a process of the pool."""


def _begin(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer


def _write(job: Job) -> Counts:
    return write_job(job, _tokenizer)


def write_job(job: Job, tokenizer: Tokenizer) -> Counts:
    """Write one file of ids, its counts and, last, its index. Raises the errors of `tokenize`."""
    dtype = id_type(tokenizer.vocab_size)
    counts = Counts(np.zeros(tokenizer.vocab_size, dtype=np.int64))
    lengths: list[int] = []
    partial = job.path.with_suffix(".partial")
    with disk_errors_explained(job.path):
        with partial.open("wb") as file:
            for records in _batches(job, tokenizer, counts):
                for record, ids in zip(records, _encoded(records, tokenizer)):
                    if job.keeps_numbers:
                        lengths += [0] * (record.document - len(lengths))
                    lengths.append(len(ids))
                    if len(ids):
                        counts.add(record.text.encode(), ids)
                    file.write(ids.astype(dtype).tobytes())
                if job.limit is not None and counts.tokens + counts.documents >= job.limit:
                    break
            file.flush()
            os.fsync(file.fileno())
        partial.replace(job.path)
        counts.save(job.path)
    write_index(job.path, lengths, dtype)
    return counts


def _encoded(records: list[Record], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Token ids of records; those of chats are there already."""
    waiting = [record.text for record in records if record.tokens is None]
    encoded = iter(tokenizer.encode_batch(waiting) if waiting else ())
    return [next(encoded) if record.tokens is None else record.tokens for record in records]


def _batches(job: Job, tokenizer: Tokenizer, counts: Counts) -> Iterator[list[Record]]:
    """Documents of a job that are not empty, in order, in lists of about `BATCH_CHARACTERS`."""
    batch: list[Record] = []
    size = 0
    bad: list[Record] = []
    for record in documents(job.source, tokenizer, [Piece(shard) for shard in job.shards], bad=bad):
        counts.skipped = len(bad)
        if record.text:
            batch += _pieces(record, job.piece_characters)
            size += len(record.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    counts.skipped = len(bad)
    if batch:
        yield batch


def _pieces(record: Record, characters: int | None) -> list[Record]:
    """A record cut after the last end of line of so many characters, or in the middle of a longer line."""
    if characters is None or record.tokens is not None or len(record.text) <= characters:
        return [record]
    pieces, begin, text = [], 0, record.text
    while begin < len(text):
        end = begin + characters
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        pieces.append(record._replace(text=text[begin:end]))
        begin = end
    return pieces


def _write_recipe(config: DataConfig, tokenizer: Tokenizer, jobs: dict[str, list[Job]], out: Path) -> None:
    """Write the tokenizer and the recipe that reads the ids in place of the documents."""
    section: dict[str, Any] = {"sources": [], "validation": []}
    for name in jobs:
        part, _, number = name.partition("-")
        source: dict[str, Any] = {"kind": "tokens", "paths": [str((out / name / "*.bin").absolute())]}
        if part == "sources":
            mixed = config.sources[int(number)]
            source |= {"weight": mixed.weight}
            if mixed.max_tokens is not None:
                source["max_tokens"] = mixed.max_tokens
        section[part].append(source)
    if config.tokenizer.kind == "huggingface":
        folder = out / "tokenizer"
        with disk_errors_explained(folder):
            tokenizer.save(folder)
        end = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
        section["tokenizer"] = {"kind": "huggingface", "name": str(folder.absolute()), "end_of_document": end}
    replace_durably(out / DATA_RECIPE, to_yaml({"data": section}).encode())
