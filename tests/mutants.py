"""Measure the share of small faults in the code that the tests catch.

    python -m pip install cosmic-ray pytest-cov
    python -m pytest -n 2 --cov=xlstm_lm --cov=eval --cov-context=test --cov-report= --junitxml=tests.xml
    python -m tests.mutants --count 200 --seed 0 --out mutants.jsonl

A seeded sample of the faults that cosmic-ray can put into `xlstm_lm` and `eval` is tried, each in a clone of the last
commit, against the quick tests that run the faulty line. The second command writes which tests those are (.coverage)
and how long each lasts (tests.xml). A fault is caught where a test that passes without it fails, or where the tests run
for over three times as long as they should. Giving the command again goes on after the last line of the results.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
USAGE_ERROR = 4
"""Exit code of pytest where a test that it is to run does not exist."""
OUT_OF_TIME = (124, 137)
"""Exit codes of `timeout` for a command that it ended, by a signal or by force."""
OPERATORS = frozenset(
    f"core/{name}"
    for name in (
        *("AddNot", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceUnaryOperator_Delete_Not"),
        *("ReplaceUnaryOperator_USub_UAdd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "NumberReplacer"),
        *(f"ReplaceComparisonOperator_{pair}" for pair in ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Eq_NotEq")),
        *(f"ReplaceComparisonOperator_{pair}" for pair in ("NotEq_Eq", "Is_IsNot", "IsNot_Is", "Lt_Gt", "Gt_Lt")),
        *(f"ReplaceBinaryOperator_{pair}" for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul")),
        *(f"ReplaceBinaryOperator_{pair}" for pair in ("Mod_FloorDiv", "Pow_Mul", "Mul_FloorDiv", "BitAnd_BitOr")),
        *("ZeroIterationForLoop", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ExceptionReplacer"),
    )
)
"""Faults that people make. Those left out raise at once (a sum as a bitwise or) or change nothing (== as is)."""


def faults(path: Path) -> Iterator[tuple[str, str, int]]:
    """File relative to the root, operator, and occurrence of every fault that a file can be given."""
    from cosmic_ray.ast import ast_nodes, get_ast_from_path
    from cosmic_ray.plugins import get_operator, operator_names

    nodes = list(ast_nodes(get_ast_from_path(path)))
    for name in sorted(OPERATORS.intersection(operator_names())):
        operator = get_operator(name)
        places = sum(1 for node in nodes for _ in operator().mutation_positions(node))
        for occurrence in range(places):
            yield str(path.relative_to(ROOT)), name, occurrence


def statement_lines(source: str, line: int) -> range:
    """Lines of the smallest statement around a line, without the body of a loop or branch; none outside functions."""
    around, inside = range(0), False
    for node in ast.walk(ast.parse(source)):  # outer statements come before those in them
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno):
            body = getattr(node, "body", None)
            end = body[0].lineno - 1 if body and body[0].lineno > node.lineno else node.end_lineno or node.lineno
            around = range(node.lineno, max(end, line) + 1) if inside else range(0)
            inside = inside or (isinstance(node, ast.FunctionDef) and line > end)
    return around


class TestChoice:
    """The tests that are to catch a fault, by what each test ran and how long it lasted.

    Args:
        coverage: data of pytest-cov, with the test that ran each line
        durations: pytest's report of the same run in JUnit's format
        seconds: time for the tests of one fault; those beyond it are not tried
    """

    __test__ = False

    def __init__(self, coverage: Path, durations: Path, seconds: float) -> None:
        from coverage import CoverageData

        self.data = CoverageData(str(coverage))
        self.data.read()
        self.measured = {Path(name).parts: name for name in self.data.measured_files()}
        self.seconds = seconds
        self.duration = {
            f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}": float(case.get("time", 0))
            for case in ElementTree.parse(durations).iter("testcase")
        }

    def running(self, file: str, lines: range | None) -> set[str]:
        """Tests that ran any of the lines, or any line at all outside an import."""
        parts = Path(file).parts
        name = next((name for path, name in self.measured.items() if path[-len(parts) :] == parts), None)
        found = self.data.contexts_by_lineno(name) if name else {}
        return {
            context.rpartition("|")[0]
            for line, contexts in found.items()
            if lines is None or line in lines
            for context in contexts
            if context
        }

    def tests(self, file: str, lines: range) -> tuple[list[str], float]:
        """Tests to try, in this order, and the seconds that they last without a fault.

        A line that runs at import, in another process or as a kernel has no tests of its own: those of the rest of its
        file stand in, those that import it, and those of the folder that mirrors its own. First come tests of a file
        that imports the faulty one, then those of that folder, then those whose names share the most words with its
        path: most faults are caught by the first.
        """
        package, *parts = Path(file).parts
        mirror = f"tests/{'eval' if package == 'eval' else parts[0]}/"
        module = ".".join(Path(file).with_suffix("").parts).removesuffix(".__init__")
        paths = (str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))
        importing = {path for path in paths if f"{module} import " in (ROOT / path).read_text(encoding="utf-8")}
        words = set(re.split(r"\W|_", file))

        def place(test: str) -> tuple[bool, bool, int, str, float]:
            path = test.split("::")[0]
            shared = len(words.intersection(Path(path).stem.split("_")))
            return path not in importing, not path.startswith(mirror), -shared, path, self.duration.get(test, 1.0)

        near = {test for test in self.duration if test.split("::")[0] in importing or test.startswith(mirror)}
        found = self.running(file, lines) or self.running(file, None) | near
        chosen, total = [], 0.0
        for test in sorted(found, key=place):
            total += self.duration.get(test, 1.0)
            if total > self.seconds and chosen:
                break
            chosen.append(test)
        return chosen, min(total, self.seconds)


def failing(tree: Path, tests: list[str], seconds: float) -> tuple[str | None, list[str]]:
    """The test that fails first, or "out of time", or None where all pass, and the last lines that pytest prints."""
    listed = tree / "chosen_tests.txt"
    listed.write_text("\n".join(tests) + "\n", encoding="utf-8")
    limit = ["timeout", "--kill-after=10", f"{seconds:.0f}"]  # ends the processes that the tests started, too
    command = [*limit, sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"@{listed.name}"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-3:]
    if done.returncode in (0, *OUT_OF_TIME):
        return "out of time" if done.returncode else None, last
    files = list(dict.fromkeys(test.split("::")[0] for test in tests)) if done.returncode == USAGE_ERROR else tests
    if files != tests:  # the fault renames a case
        return failing(tree, files, seconds)
    named = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return named.group(1) if named else "pytest itself", last


def try_fault(tree: Path, fault: tuple[str, str, int], choice: TestChoice) -> dict[str, object]:
    """Put one fault into the copy, run its tests until one fails, and take it out again."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    file, operator, occurrence = fault
    path = tree / file
    right = path.read_text(encoding="utf-8")
    wrong = mutate_code(right, get_operator(operator)(), occurrence)
    assert wrong is not None and wrong != right, fault
    lines = zip(right.splitlines(), wrong.splitlines())
    line, changed = next(((n, new) for n, (old, new) in enumerate(lines, 1) if old != new), (0, ""))
    tests, seconds = choice.tests(file, statement_lines(right, line))
    path.write_text(wrong, encoding="utf-8")
    try:
        caught_in, last = failing(tree, tests, 120 + 3 * seconds) if tests else (None, ["no test runs this file"])
    finally:
        path.write_text(right, encoding="utf-8")
    return {
        "file": file,
        "line": line,
        "changed": changed.strip(),
        "operator": operator,
        "occurrence": occurrence,
        "tests": len(tests),
        "caught": caught_in is not None,
        "caught_in": caught_in,
        "last": last,
    }


def main() -> None:
    """Sample, try and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="faults to try")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--part", default="0/1", help="share of the sample to try here, for several processes: 0/2, 1/2"
    )
    parser.add_argument("--seconds", type=float, default=300, help="time for the tests of one fault, without the fault")
    parser.add_argument("--coverage", type=Path, default=Path(".coverage"), help="the tests that ran each line")
    parser.add_argument("--durations", type=Path, default=Path("tests.xml"), help="how long each test lasted")
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"), help="results, a line each; appended to")
    arguments = parser.parse_args()
    files = sorted(path for package in ("xlstm_lm", "eval") for path in (ROOT / package).rglob("*.py"))
    sample = random.Random(arguments.seed).sample([fault for path in files for fault in faults(path)], arguments.count)
    choice = TestChoice(arguments.coverage, arguments.durations, arguments.seconds)
    part, parts = map(int, arguments.part.split("/"))
    done = arguments.out.read_text(encoding="utf-8").splitlines() if arguments.out.exists() else []
    tried = [json.loads(line) for line in done]
    seen = {(each["file"], each["operator"], each["occurrence"]) for each in tried}
    with tempfile.TemporaryDirectory(prefix="mutants_") as scratch:
        tree = Path(scratch) / "tree"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tree)], check=True)
        (tree / ".venv").symlink_to(ROOT / ".venv")  # the oracles are in it
        passing: set[str] = set()
        for fault in sample[part::parts]:
            if fault not in seen:
                tried.append(try_fault(tree, fault, choice))
                test = str(tried[-1]["caught_in"])
                if "::" in test and test not in passing:
                    failed, last = failing(tree, [test], 3600)
                    if failed:
                        sys.exit(f"{test} fails without any fault:\n" + "\n".join(last))
                    passing.add(test)
                with arguments.out.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(tried[-1]) + "\n")
    counts = Counter(each["caught"] for each in tried)
    print(f"{counts[True]} of {len(tried)} faults caught ({counts[True] / len(tried):.1%})")
    for each in tried:
        if not each["caught"]:
            print(f"  {each['file']}:{each['line']}: {each['changed']}")


if __name__ == "__main__":
    main()
