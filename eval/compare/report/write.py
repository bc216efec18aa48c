"""Write a comparison's report: one page for the browser that needs nothing else, the same as Markdown, and as JSON."""

from __future__ import annotations

from pathlib import Path

import jinja2

from eval.compare.report import select
from eval.compare.report.answer import checks, further_findings, verdict
from eval.compare.report.drawing import COLOURS
from eval.compare.report.parts import Cell, Section, Table
from eval.compare.report.pictures import colours_of
from eval.compare.report.sections import sections
from eval.compare.results import Results, save_results

PICTURES = "pictures"


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write report.html, report.md, results.json and pictures/*.png into the folder and give their paths.

    What the results lack is said in the report.
    """
    shown = sections(results)
    verdicts = [verdict(results, size) for size in select.sizes_of(results)]
    words = {
        "results": results,
        "verdicts": verdicts,
        "findings": further_findings(results),
        "checks": checks(results),
        "sections": [section for section in shown if section.absent or not section.is_empty],
    }
    pictures = [picture for section in shown for part in section.parts for picture in part.pictures]
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    written = {folder / PICTURES / f"{picture.name}.png": picture.png for picture in pictures}
    written[folder / "report.html"] = _page(words, colours_of(results)).encode()
    written[folder / "report.md"] = _markdown(words).encode()
    for path, content in written.items():
        path.write_bytes(content)
    save_results(results, folder / "results.json")
    return [folder / "report.html", folder / "report.md", folder / "results.json", *list(written)[: len(pictures)]]


def _page(words: dict[str, object], colours: dict[str, int]) -> str:
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), **options)
    return environment.get_template("report.html.jinja").render(**words, colours=colours, palette=COLOURS)


def _markdown(words: dict[str, object]) -> str:
    results: Results = words["results"]
    lines = [f"# {plain(results.title)}", "", plain(results.question), ""]
    lines += [f"* **{each.size}: {plain(each.outcome)}.** {plain(each.sentence)}" for each in words["verdicts"]]
    lines += [f"* {title}. {plain(' '.join(sentences))}" for title, sentences in words["findings"]]
    if results.missing:
        lines += ["", "Missing:", "", *(f"* {plain(each)}" for each in results.missing)]
    lines += ["", "Whether the comparison is fair:", ""]
    lines += [f"* {'yes' if holds else '**look**'}: {plain(sentence)}" for holds, sentence in words["checks"]]
    lines += [f"* {plain(each)}" for each in results.notes]
    for section in words["sections"]:
        lines += ["", f"## {section.title}", "", *_section_lines(section)]
    return "\n".join(lines) + "\n"


def _section_lines(section: Section) -> list[str]:
    if section.is_empty:
        return [plain(section.absent)]
    lines = [plain(section.lead)] if section.lead else []
    for part in section.parts:
        lines += ["", f"### {plain(part.heading)}"] if part.heading else []
        for picture in part.pictures:
            lines += ["", f"![{plain(picture.alt)}]({PICTURES}/{picture.name}.png)".replace(" .png", ".png")]
        for table in part.tables:
            lines += ["", f"{plain(table.title)}:", ""] if table.title else [""]
            lines += table_lines(table)
    for title, text in section.folds:
        lines += ["", f"{plain(title)}:", "", *(f"    {line}" for line in text.splitlines())]
    lines += [f"* **{plain(term)}**: {plain(meaning)}" for term, meaning in section.terms]
    return lines


def table_lines(table: Table) -> list[str]:
    """A table of Markdown."""
    rule = ["---" if place in table.words else "---:" for place in range(len(table.columns))]
    rows = [[Cell(column) for column in table.columns], [Cell(each) for each in rule], *table.rows]
    return ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]


def _cell(cell: Cell) -> str:
    text = plain(cell.text).replace("|", "\\|")
    return f"**{text}**" if cell.strong and text else text


def plain(text: str) -> str:
    """One line, in which Markdown finds no markup of HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
