"""Where documents come from: local files, the Python standard library, or a data set on the Hugging Face hub.

Every source is read through `datasets` in streaming mode and shows the same face: a number of shards (files), and
`read`, which gives the records of a list of shards from any position on.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple, Protocol

import pyarrow

from xlstm_lm.base.fields import NonNegative, Range, check_fields
from xlstm_lm.ops.announce import announce_once

LOCAL_KINDS = ("text", "text_lines", "jsonl", "parquet")
ONE_DOCUMENT_A_FILE = ("text", "python_stdlib")
# Not text a person would read first: tests hold files that are broken on purpose, site-packages is not the library.
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
STDLIB_HELD_OUT = 16


@dataclass(kw_only=True)
class SourceConfig:
    """One source of documents in a mixture."""

    kind: Literal["text", "text_lines", "jsonl", "parquet", "hub", "python_stdlib"] = "text"
    """One document a file (text), line (text_lines), JSON object (jsonl) or row (parquet); the hub; Python's source."""
    paths: list[str] = field(default_factory=list)
    """Local files or glob patterns (** goes into folders); text and JSON lines may end in .gz, .bz2, .xz or .zst."""
    dataset: str | None = None
    """Id on the hub, such as HuggingFaceFW/fineweb-edu (kind hub)."""
    config_name: str | None = None
    """Which configuration of the hub data set (kind hub)."""
    data_files: list[str] = field(default_factory=list)
    """Only these files of the hub data set, patterns allowed (kind hub)."""
    revision: str | None = None
    """Commit, tag or branch of the hub data set; without it the newest commit at the time the run starts (kind hub)."""
    split: str = "train"
    """Split of the hub data set; for python_stdlib train, or validation for the files held out of it (1 in 16)."""
    text_field: str = "text"
    """Field or column that holds the text (kinds jsonl, parquet, hub)."""
    weight: Annotated[float, Range(0, 1e15, open_below=True)] = 1.0
    """Share of the training tokens, relative to the other sources' weights."""
    on_bad_document: Literal["error", "skip"] = "error"
    """Whether a document that is not UTF-8, not JSON or without text stops the run, or is skipped and counted."""
    retry_seconds: NonNegative = 600.0
    """How long to go on asking when the hub does not answer (kind hub)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind in LOCAL_KINDS and not self.paths:
            raise ValueError(
                f"a source of kind {self.kind} needs paths: a list of files or patterns such as data/*.txt"
            )
        if self.kind not in LOCAL_KINDS and self.paths:
            raise ValueError(f"a source of kind {self.kind} takes no paths (got {self.paths})")
        if self.kind == "hub" and not self.dataset:
            raise ValueError("a source of kind hub needs dataset: its id, such as HuggingFaceFW/fineweb-edu")
        if self.kind != "hub" and (self.dataset or self.config_name or self.data_files or self.revision):
            raise ValueError(
                f"dataset, config_name, data_files and revision belong to sources of kind hub, not {self.kind}"
            )
        if self.kind == "python_stdlib" and self.split not in ("train", "validation"):
            raise ValueError(f"split {self.split!r} of python_stdlib is not known: train or validation")

    @property
    def description(self) -> str:
        """How messages call the source."""
        if self.kind == "hub":
            return f"hub data set {self.dataset}"
        return "python_stdlib" if self.kind == "python_stdlib" else f"{self.kind} {', '.join(self.paths)}"


class Piece(NamedTuple):
    """What one lane reads of one shard: the whole (1 part), or one of several parts."""

    shard: int
    part: int = 0
    parts: int = 1


class Record(NamedTuple):
    """A document as read, or what is wrong with it."""

    piece: int
    """Position in the list of pieces that is being read."""
    document: int
    """Number of the document within its shard."""
    text: str
    """Its text; empty if there is a problem."""
    id: str
    """File and, within files of many documents, line or row."""
    problem: str | None = None
    """What is wrong with it, naming file and line."""


class Source(Protocol):
    """A source of documents."""

    config: SourceConfig
    num_shards: int
    shard_sizes: list[int]
    """Relative sizes by which shards are dealt to lanes."""
    announced_skipping: bool
    """Whether it was said that bad documents are skipped."""

    def read(self, pieces: list[Piece], first_piece: int = 0, first_document: int = 0) -> Iterator[Record]:
        """Records of `pieces` in order, from document `first_document` of piece `first_piece` on."""

    def identity(self) -> dict[str, Any]:
        """What it reads, in JSON: differs where the documents or their order would."""


def refuse(source: Source, record: Record) -> None:
    """Stop at a bad document, or say once that such are skipped.

    Raises:
        ValueError: bad documents are errors in this source.
    """
    assert record.problem is not None
    if source.config.on_bad_document == "error":
        raise ValueError(f"{record.problem}. Mend it, or set on_bad_document: skip for this source")
    if not source.announced_skipping:
        source.announced_skipping = True
        announce_once(f"bad documents of {source.config.description} are skipped; the first: {record.problem}")


class FileSource:
    """Text, lines or JSON lines of local files."""

    def __init__(self, config: SourceConfig) -> None:
        """List and look at the files.

        Raises:
            ValueError: a pattern without a file, or an empty file (unless bad documents are to be skipped).
        """
        self.config = config
        self.announced_skipping = False
        # Names identify documents wherever the files lie: an installation's own path is no part of them.
        if config.kind == "python_stdlib":
            self.names, self._paths = _stdlib_files(config.split)
        else:
            self.names = self._paths = list_files(config)
        self.shard_sizes = [Path(path).stat().st_size for path in self._paths]
        self.num_shards = len(self._paths)

    def read(self, pieces: list[Piece], first_piece: int = 0, first_document: int = 0) -> Iterator[Record]:
        from datasets.iterable_dataset import ExamplesIterable, IterableDataset

        shards = [
            (
                index,
                self._paths[piece.shard],
                self.names[piece.shard],
                piece,
                first_document if index == first_piece else 0,
            )
            for index, piece in enumerate(pieces)
            if index >= first_piece
        ]
        if not shards:
            return
        arguments: dict[str, Any] = {"shards": shards}
        reader = read_whole_files
        if self.config.kind not in ONE_DOCUMENT_A_FILE:
            reader = read_lines
            arguments["text_field"] = self.config.text_field if self.config.kind == "jsonl" else None
        # IterableDataset.from_generator would leave a lock file in the user's cache for every lane, epoch and restart.
        for record in IterableDataset(ExamplesIterable(reader, arguments)):
            yield Record(**record)

    def identity(self) -> dict[str, Any]:
        files = [[Path(name).name, size] for name, size in zip(self.names, self.shard_sizes)]
        identity = {"kind": self.config.kind, "files": self.num_shards, "digest": digest(files)}
        return identity | ({"text_field": self.config.text_field} if self.config.kind == "jsonl" else {})


def list_files(config: SourceConfig) -> list[str]:
    """Files that the patterns of a local source match, sorted, each once.

    Raises:
        ValueError: a pattern that matches nothing, or an empty file unless bad documents are skipped.
    """
    found: set[str] = set()
    for pattern in config.paths:
        matches = [path for path in glob.iglob(pattern, recursive=True) if Path(path).is_file()]  # noqa: PTH207
        if not matches and Path(pattern).is_dir():
            raise ValueError(f"{pattern} is a folder: name the files in it, such as {pattern.rstrip('/')}/*.txt")
        if not matches:
            raise ValueError(f"data file {pattern} is missing: no file matches it (in {Path.cwd()})")
        found.update(matches)
    for path in sorted(found):
        if config.on_bad_document == "error" and Path(path).stat().st_size == 0:
            raise ValueError(f"data file {path} is empty: remove it, or set on_bad_document: skip for this source")
    return sorted(found)


def _stdlib_files(split: str) -> tuple[list[str], list[str]]:
    """Names and paths of the standard library's files of a split. Held out by name alone: splits never overlap."""
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in STDLIB_EXCLUDED]  # site-packages can be very large
        paths = [Path(folder) / name for name in files if name.endswith(".py")]
        names += [path.relative_to(root).as_posix() for path in paths if path.stat().st_size > 0]
    if not names:
        raise ValueError(
            f"no Python source files in {root}: this Python comes without its standard library's source; "
            "use a source of kind text with files of yours"
        )
    digests = {name: hashlib.sha256(name.encode()).digest() for name in names}
    held_out = {name for name in names if digests[name][0] % STDLIB_HELD_OUT == 0}
    if split == "validation":
        # In the order of the digests, so that the first few are a fair sample.
        names = sorted(held_out, key=digests.__getitem__)
    else:
        names = sorted(set(names) - held_out)
    return names, [str(root / name) for name in names]


def open_file(path: str) -> IO[bytes]:
    """Open a local file to read its bytes, decompressed as its name says."""
    suffix = Path(path).suffix
    if suffix in (".zst", ".zstd"):
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))  # type: ignore[arg-type]
    opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)
    return opener(path, "rb")  # type: ignore[operator]


def read_whole_files(shards: list[tuple[int, str, str, Piece, int]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of files that are one document each; a part is that part of the characters."""
    for index, path, name, piece, first_document in shards:
        if first_document > 0:
            continue
        record = Record(index, 0, "", name)
        try:
            with open_file(path) as file:
                text = file.read().decode()
            if piece.parts > 1:
                cuts = [len(text) * part // piece.parts for part in (piece.part, piece.part + 1)]
                text = text[cuts[0] : cuts[1]]
                record = record._replace(id=f"{name}[{piece.part + 1}/{piece.parts}]")
            record = record._replace(text=text)
            if not text and piece.parts == 1:
                record = record._replace(problem=f"data file {path} is empty")
        except UnicodeDecodeError as error:
            record = record._replace(problem=f"data file {path} is not UTF-8 (byte {error.start}: {error.reason})")
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            record = record._replace(problem=f"data file {path} cannot be read ({error})")
        yield record.id, record._asdict()


def read_lines(
    shards: list[tuple[int, str, str, Piece, int]], text_field: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of files with a document a line, plain or (with `text_field`) a JSON object; parts take turns."""
    for index, path, name, piece, first_document in shards:
        number = -1
        try:
            with open_file(path) as file:
                for number, line in enumerate(file):
                    if number < first_document or number % piece.parts != piece.part or not line.strip():
                        continue
                    text, problem = _parse_line(line, text_field)
                    if problem is not None:
                        problem = f"data file {path}, line {number + 1}: {problem}"
                    record = Record(index, number, text, f"{name}:{number + 1}", problem)
                    yield record.id, record._asdict()
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            problem = f"data file {path} cannot be read after line {number + 1} ({error})"
            yield name, Record(index, number + 1, "", name, problem)._asdict()


def _parse_line(line: bytes, text_field: str | None) -> tuple[str, str | None]:
    """The text of a line, or what is wrong with it."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 (byte {error.start} of the line: {error.reason})"
    if text_field is None:
        return text.rstrip("\r\n"), None
    try:
        value = json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        return "", f"not JSON ({error.msg} at column {error.colno})"
    if not isinstance(value, dict):
        return "", f"a JSON object with a field {text_field!r} is wanted, not {type(value).__name__}"
    return text_of(value, text_field)


def text_of(fields: dict[str, Any], text_field: str) -> tuple[str, str | None]:
    """The text among a document's fields, or what is wrong with it."""
    text = fields.get(text_field)
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError:
            return "", f"field {text_field!r} holds half a surrogate pair, which is no character"
        return text, None
    if text_field not in fields:
        return "", f"no field {text_field!r} among {', '.join(fields) or 'none'}; the setting is text_field"
    return "", f"field {text_field!r} holds {type(text).__name__}, not text"


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
