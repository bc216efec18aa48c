"""The sources of a run, opened by one process for all, and the commits of the hub at which they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from xlstm_lm.data.config import DataConfig
from xlstm_lm.data.sources import ORDER, Source, SourceConfig, open_source


class Commit(NamedTuple):
    """The commit to which a run has resolved a revision of a data set on the hub."""

    dataset: str
    """Id of the data set."""
    revision: str | None
    """Revision that the recipe names; None for the newest."""
    commit: str
    """Commit, 40 hexadecimal digits."""


@dataclass(frozen=True)
class Opened:
    """Listed and inspected sources. They can be pickled, and another process reads them without a further look."""

    order: int
    """Order of documents, as in `xlstm_lm.data.sources.ORDER`."""
    sources: list[Source]
    """Training sources, in the order of the data section."""
    validation: list[Source]
    """Validation sources, in the order of the data section."""
    commits: list[Commit]
    """Commits of all sources on the hub, each once."""


def open_sources(
    config: DataConfig, fingerprint: Mapping[str, Any] | None = None, commits: Iterable[Commit] = ()
) -> Opened:
    """Open the sources of a run, where it resumes as it opened them first.

    Args:
        config: Data section of the run.
        fingerprint: That of the stream to continue; None for a new run.
        commits: Commits that the run has used before. Those of the fingerprint come first.

    Raises:
        ValueError: Files that are missing or empty; a data set that is not there.
        ConnectionError: The hub does not answer.
    """
    order = ORDER if fingerprint is None else fingerprint.get("order", 1)
    known = {(each.dataset, each.revision): each.commit for each in commits}
    known |= commits_of(fingerprint or {})
    found: dict[Commit, None] = {}

    def opened(source: SourceConfig) -> Source:
        if source.kind != "hub":
            return open_source(source, order)
        dataset, asked = str(source.dataset), source.revision
        # The first source of a data set decides for later ones, whatever is pushed to the hub between them.
        if commit := known.get((dataset, asked)):
            source = replace(source, revision=commit)
        result: Any = open_source(source, order)
        known.setdefault((dataset, asked), result.commit)
        found[Commit(dataset, asked, result.commit)] = None
        return result

    return Opened(order, [*map(opened, config.sources)], [*map(opened, config.validation)], list(found))


def commits_of(fingerprint: Mapping[str, Any]) -> dict[tuple[str, str | None], str]:
    """Commits in a fingerprint, by data set and None, for sources that name no revision."""
    sources = [*fingerprint.get("validation", ()), *fingerprint.get("sources", ())]
    return {(each["dataset"], None): each["revision"] for each in sources if each.get("kind") == "hub"}
