"""Measure the share of small faults in the code that the tests catch.

    python -m pip install cosmic-ray
    python -m tests.mutants --count 200 --seed 0 --out mutants.jsonl

A seeded sample of the faults that cosmic-ray can put into `xlstm_lm` and `eval` is tried, each in a clone of the
last commit, against the quick tests of its folder and those elsewhere that import its file. A fault is caught where a
test file fails or runs out of time that does neither without the fault. Giving the command again goes on after the last
line of the results.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
NO_TESTS = 5
"""Exit code of pytest where a file has slow tests alone."""
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


def tests_of(file: str) -> list[str]:
    """Test files that are to catch the faults of a file, in the order of their trial.

    They are those of the folder that mirrors its own, or those beside the folders, and all others that import it. Those
    that import it come first, then those whose names share the most words with its path: most faults are then caught by
    the first. No test imports a backend, as it is loaded by its name.
    """
    package, *parts = Path(file).parts
    folder = ROOT / "tests" / ("eval" if package == "eval" else parts[0])
    mirror = set((folder if folder.is_dir() else ROOT / "tests").glob("test_*.py"))
    module = ".".join(Path(file).with_suffix("").parts).removesuffix(".__init__")
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    importing = {path for path in paths if f"{module} import " in path.read_text(encoding="utf-8")}
    words = set(re.split(r"\W|_", file))

    def place(path: Path) -> tuple[bool, bool, int, Path]:
        return path not in importing, path not in mirror, -len(words.intersection(path.stem.split("_"))), path

    order = sorted(mirror | importing, key=place)
    return [str(path.relative_to(ROOT)) for path in order]


def fails(tree: Path, test: str, seconds: int) -> tuple[bool, list[str]]:
    """Whether a test file fails or runs out of its seconds, and the last lines that it prints."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    try:
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return True, ["out of time"]
    return done.returncode not in (0, NO_TESTS), done.stdout.strip().splitlines()[-3:]


def try_fault(tree: Path, fault: tuple[str, str, int], seconds: int, most: int | None) -> dict[str, object]:
    """Put one fault into the copy, run its first `most` test files until one fails, and take it out again."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    file, operator, occurrence = fault
    path = tree / file
    right = path.read_text(encoding="utf-8")
    wrong = mutate_code(right, get_operator(operator)(), occurrence)
    assert wrong is not None and wrong != right, fault
    lines = zip(right.splitlines(), wrong.splitlines())
    line, changed = next(((n, new) for n, (old, new) in enumerate(lines, 1) if old != new), (0, ""))
    caught_in, by = None, [""]
    path.write_text(wrong, encoding="utf-8")
    try:
        for test in tests_of(file)[:most]:
            failed, by = fails(tree, test, seconds)
            if failed:
                caught_in = test
                break
    finally:
        path.write_text(right, encoding="utf-8")
    return {
        "file": file,
        "line": line,
        "changed": changed.strip(),
        "operator": operator,
        "occurrence": occurrence,
        "caught": caught_in is not None,
        "caught_in": caught_in,
        "by": by,
    }


def main() -> None:
    """Sample, try and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="faults to try")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--part", default="0/1", help="share of the sample to try here, for several processes: 0/2, 1/2"
    )
    parser.add_argument("--seconds", type=int, default=3600, help="time for one test file")
    parser.add_argument("--most", type=int, help="test files to try on a fault; the share is then a lower bound")
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"), help="results, a line each; appended to")
    arguments = parser.parse_args()
    files = sorted(path for package in ("xlstm_lm", "eval") for path in (ROOT / package).rglob("*.py"))
    sample = random.Random(arguments.seed).sample([fault for path in files for fault in faults(path)], arguments.count)
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
                tried.append(try_fault(tree, fault, arguments.seconds, arguments.most))
                test = tried[-1]["caught_in"]
                if test is not None and test not in passing:
                    failed, last = fails(tree, test, arguments.seconds)
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
