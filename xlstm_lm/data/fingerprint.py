"""Whether two streams give the same tokens in the same order, by what their fingerprints say.

A fingerprint has a value for each setting that counts, and for each source what `Source.identity` says. Of local files
that is: `sizes`, by which they are dealt to lanes; `contents`, 8 digits for each file, in order; `digest` of names and
sizes, which alone counts against a checkpoint that has no `contents`; and `newest`, the time of the latest change among
files too large to be hashed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

DIGITS = 8
NOT_COMPARED = ("digest", "sizes", "contents", "newest", "weight")
Ruling = Callable[[int, list[int]], list[str]]
"""Given a source and its changed files, by number: a line for each that may not have changed."""


def refuse_all(source: int, files: list[int]) -> list[str]:
    """The ruling that no file may have changed."""
    return [f"file {number}: other content" for number in files]


def fingerprint_differences(
    before: Mapping[str, Any], now: Mapping[str, Any], ruling: Ruling = refuse_all
) -> list[str]:
    """One line for each difference that alters the order of tokens, or the tokens.

    Args:
        before: the fingerprint in a checkpoint.
        now: that of the stream which is to go on.
        ruling: which changed files count; all unless given.
    """
    before, now = {"order": 1} | dict(before), {"order": 1} | dict(now)
    lines = [
        f"  {name}: {before.get(name, 'not set')!r} there, {now.get(name, 'not set')!r} now"
        for name in sorted(before.keys() | now.keys())
        if name not in ("sources", "validation") and before.get(name) != now.get(name)
    ]
    old, new = before.get("sources"), now.get("sources")
    if not isinstance(old, list) or not isinstance(new, list) or len(old) != len(new):
        return lines + ([] if old == new else [f"  sources: {old!r} there, {new!r} now"])
    for index, (there, here) in enumerate(zip(old, new)):
        there, here = there | _share(old, index), here | _share(new, index)
        found = source_differences(there, here)
        lines += [f"  sources[{index}].{line}" for line in found]
        if not found:
            lines += [f"  sources[{index}]: {line}" for line in ruling(index, changed_files(there, here))]
    return lines


def source_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each setting of a source that differs; changed files are told by `changed_files`."""
    lines = [
        f"{name}: {before.get(name, 'not set')!r} there, {now.get(name, 'not set')!r} now"
        for name in sorted(before.keys() | now.keys())
        if name not in NOT_COMPARED and before.get(name) != now.get(name)
    ]
    known = "contents" in before and "contents" in now
    if not lines and not known and before.get("digest") != now.get("digest"):
        lines.append("digest: names or sizes of the files are others")
    return lines


def changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[int]:
    """The files of a source, by number, whose content is another; none where a checkpoint does not tell."""
    old, new = before.get("contents", ""), now.get("contents", "")
    if len(old) != len(new):
        return []
    return [at // DIGITS for at in range(0, len(old), DIGITS) if old[at : at + DIGITS] != new[at : at + DIGITS]]


def _share(sources: list[dict[str, Any]], index: int) -> dict[str, float]:
    """The weight of a source as its share: only that counts."""
    return {"share": round(sources[index].get("weight", 1.0) / sum(each.get("weight", 1.0) for each in sources), 9)}
