"""The settings of one source of documents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from xlstm_lm.base.errors import some_of
from xlstm_lm.base.fields import NonNegative, Range, check_fields

_READERS = "xlstm_lm.data.sources.readers"
_LOCAL = "xlstm_lm.data.sources.local"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One way in which documents are stored. Code is named as "module:name" and imported at its first use."""

    source: str = f"{_LOCAL}:FileSource"
    """The `Source` that opens it."""
    reader: str = ""
    """Generator of the records of files, as in `xlstm_lm.data.sources.readers`; empty without files."""
    look: str = ""
    """Function of the opened source that inspects its files and refuses or announces; empty for none."""
    takes_paths: bool = True
    """Whether `paths` name its files."""
    one_document_a_file: bool = False
    has_text_field: bool = False
    """Whether a document is the field `text_field` among several."""
    has_lists: bool = False
    """Whether a field may be a list, as the messages of a chat are."""


KINDS = {
    "text": Kind(reader=f"{_READERS}:read_whole_files", look=f"{_LOCAL}:point_out_json", one_document_a_file=True),
    "text_lines": Kind(reader=f"{_READERS}:read_lines", look=f"{_LOCAL}:point_out_json"),
    "jsonl": Kind(reader=f"{_READERS}:read_lines", has_text_field=True, has_lists=True),
    "csv": Kind(reader="xlstm_lm.data.sources.delimited:read_csv", has_text_field=True),
    "parquet": Kind(reader=f"{_READERS}:read_rows", look=f"{_LOCAL}:check_column", has_text_field=True, has_lists=True),
    "tar": Kind(reader="xlstm_lm.data.sources.archives:read_archives", has_text_field=True, has_lists=True),
    "tokens": Kind(reader="xlstm_lm.data.sources.tokens:read_tokens", look="xlstm_lm.data.sources.tokens:describe"),
    "hub": Kind(source="xlstm_lm.data.sources.hub:HubSource", takes_paths=False, has_text_field=True, has_lists=True),
    "python_stdlib": Kind(reader=f"{_READERS}:read_whole_files", takes_paths=False, one_document_a_file=True),
}
"""Every kind of source. A new one is its reader, in a file of its own, and a row here."""


@dataclass(kw_only=True)
class SourceConfig:
    """One source of documents in a mixture."""

    kind: Literal[*KINDS] = "text"  # type: ignore[valid-type]  # a type made from the table
    """One document a file (text), line (text_lines), object (jsonl), row (csv, parquet) or group of files (tar); token
    ids that `xlstm-lm tokenize` wrote; the hub; Python's source."""
    paths: list[str] = field(default_factory=list)
    """Files or glob patterns (** goes into folders, ~ is the home folder); a name that exists is no pattern. URLs, such
    as s3://bucket/*.parquet, are opened by fsspec. Text and JSON lines may be compressed by gzip, bzip2, xz or zstd,
    whatever the name."""
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
    """Field or column that holds the text (kinds jsonl, csv, parquet, hub); of kind tar the ending of the file with it,
    such as txt, or an entry of its json."""
    template: str | None = None
    """Text of a document out of several fields, such as "{title}: {text}", in place of text_field."""
    chat: str | None = None
    """Field that holds a chat, in place of text_field: a list of messages, objects with role and content, which the
    tokenizer's chat template renders."""
    weight: Annotated[float, Range(0, 1e15, open_below=True)] = 1.0
    """Share of the training tokens, relative to the other sources' weights, or of passes by `weight_by`."""
    weight_by: Literal["tokens", "epochs"] = "tokens"
    """Unit of the weights, the same for all sources: tokens, or passes over all documents (kind tokens, as their number
    must be known)."""
    max_tokens: Annotated[int, Range(1, 10**15)] | None = None
    """Tokens after which a run reads no more of the source, an equal part in each lane; None for no limit."""
    on_bad_document: Literal["error", "skip"] = "error"
    """Whether a document that is not UTF-8, not JSON, without text or not encodable stops the run, or is skipped and
    counted."""
    retry_seconds: NonNegative = 600.0
    """Seconds of retries while the hub does not answer (kind hub)."""
    cache_gib: NonNegative = 16.0
    """GiB of each node's disk, at most, for bytes fetched from the hub, which all processes and runs there share; 0 for
    none (kind hub)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if KINDS[self.kind].takes_paths and not self.paths:
            raise ValueError(
                f"a source of kind {self.kind} needs paths: a list of files or patterns such as data/*.txt"
            )
        if not KINDS[self.kind].takes_paths and self.paths:
            raise ValueError(f"a source of kind {self.kind} takes no paths (got {self.paths})")
        if self.template is not None and (not KINDS[self.kind].has_text_field or self.text_field != "text"):
            wrong = "text_field" if KINDS[self.kind].has_text_field else "template"
            raise ValueError(
                f"template {self.template!r} takes the place of text_field, in sources whose documents have fields: "
                f"remove {wrong} (kind {self.kind})"
            )
        if self.chat is not None and (self.text_field != "text" or self.template is not None):
            wrong = "text_field" if self.text_field != "text" else "template"
            raise ValueError(f"chat {self.chat!r} takes the place of {wrong}: remove one of them")
        if self.chat is not None and not KINDS[self.kind].has_lists:
            raise ValueError(
                f"chat {self.chat!r} needs documents whose fields may be lists, of kind "
                f"{', '.join(name for name in KINDS if KINDS[name].has_lists)}, not {self.kind}"
            )
        if self.kind == "hub" and not self.dataset:
            raise ValueError("a source of kind hub needs dataset: its id, such as HuggingFaceFW/fineweb-edu")
        if self.kind != "hub" and (self.dataset or self.config_name or self.data_files or self.revision):
            raise ValueError(
                f"dataset, config_name, data_files and revision belong to sources of kind hub, not {self.kind}"
            )
        if self.weight_by == "epochs" and self.kind != "tokens":
            raise ValueError(
                f"weight_by: epochs needs a source whose tokens are counted, and kind is {self.kind}: write its token "
                "ids by xlstm-lm tokenize, or set weight_by: tokens"
            )
        if self.kind == "python_stdlib" and self.split not in ("train", "validation"):
            raise ValueError(f"split {self.split!r} of python_stdlib is not known: train or validation")

    @property
    def description(self) -> str:
        """Name of the source in messages."""
        if self.kind == "hub":
            return f"hub data set {self.dataset}"
        return "python_stdlib" if self.kind == "python_stdlib" else f"{self.kind} {some_of(self.paths, 3)}"
