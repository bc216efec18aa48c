"""Accuracy on tasks: `python -m eval.downstream --model FOLDER --tasks xlstm_paper`.

Runs any task of lm-evaluation-harness (extra `eval`) on a run, a checkpoint, an export or any causal model of
transformers. `xlstm_paper` is the table of the xLSTM paper, `standard` adds OpenBookQA and WikiText-2, `local` needs no
network. A model that carries its state sees contexts and documents whole, however long; others see windows.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.bench.tables import markdown_table
from eval.command import add_model_flags, environment, load_named_model, positive
from eval.scoring.models import CausalModel
from eval.study.results_file import results_file, write_results
from xlstm_lm.base import console
from xlstm_lm.base.errors import first_line
from xlstm_lm.base.program import program

HERE = Path(__file__).parent
KEPT = ("results", "groups", "versions", "n-shot", "samples")
"""Parts of lm_eval's results that are written to the file."""
LOCAL_TASKS, TASK_GROUPS = HERE / "tasks_local", HERE / "task_groups"


def find_tasks(names: Sequence[str], include: Path | None = None) -> Any:
    """lm_eval's task manager that knows all `names`: local tasks, the groups here, those of `include`, lm_eval's own.

    Raises:
        ValueError: some names are unknown; the nearest are named.
    """
    from lm_eval.tasks import TaskManager

    folders = [str(LOCAL_TASKS), *([str(include)] if include else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)  # lm_eval's own 14,000 take many seconds
    if set(names) <= set(manager.all_tasks):
        return manager
    manager = TaskManager(include_path=[*folders, str(TASK_GROUPS)])
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        here = sorted(each.stem for folder in (LOCAL_TASKS, TASK_GROUPS) for each in folder.glob("*.yaml"))
        close = {name: difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5) for name in unknown}
        hints = [f"{name} (did you mean {' or '.join(near)}?)" if near else name for name, near in close.items()]
        raise ValueError(
            f"unknown tasks: {'; '.join(hints)}. Here are {', '.join(here)}; 'lm_eval ls tasks' lists the "
            f"{len(manager.all_tasks)} of lm_eval."
        )
    return manager


def evaluate(
    model: CausalModel,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    window: int | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    manager: Any = None,
    bootstrap_rounds: int = 1000,
) -> dict[str, Any]:
    """Run tasks on a model: lm_eval's results, with `results`, `groups`, `versions` and `samples`.

    Args:
        model: from `load_model`.
        tasks: names that the `manager` knows.
        batch_size: rows in a batch; changes no score.
        window: tokens of context; None for a model that carries its state.
        num_fewshot: examples in front of each question; None for what the task says.
        limit: documents of each task, at most.
        manager: from `find_tasks`.
        bootstrap_rounds: resamplings behind the standard errors of metrics that are no mean; 0 for none.

    Raises:
        ValueError: an unknown task, a data set that cannot be had, or a window that cannot be.
    """
    from lm_eval import simple_evaluate

    from eval.scoring.harness import HarnessModel

    wrapped = HarnessModel(model, batch_size=batch_size, window=window)
    manager = manager or find_tasks(tasks)
    try:
        loaded = [item for name in tasks for item in _load_task(manager, name)]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"a data set of {', '.join(tasks)} cannot be had ({first_line(error)}); without a network "
            f"set HF_HOME to a folder that holds it, or take the tasks of --tasks local."
        ) from error
    console.end_stage()  # lm_eval and HarnessModel show bars from here on
    # lm_eval forks a pool for standard errors, and a fork of a process with threads may hang. One process is quick too.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    return simple_evaluate(
        wrapped,
        tasks=loaded,
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=bootstrap_rounds,
    )


def _load_task(manager: Any, name: str) -> list[Any]:
    """The group of that name, the task, or all tasks that have it as their tag; reads their data."""
    found = manager.load(name)
    return [found["groups"][name]] if name in found["groups"] else [*found["tasks"].values()]


def as_markdown(results: dict[str, Any]) -> str:
    """Every metric of every task and group, with its standard error where there is one."""
    rows = []
    for task, metrics in results["results"].items():
        documents = results["n-samples"].get(task, {}).get("effective", "")
        for key, value in metrics.items():
            name, _, filtered = key.partition(",")
            if not isinstance(value, (int, float)) or name.endswith("_stderr") or not filtered:
                continue
            error = metrics.get(f"{name}_stderr,{filtered}", "")
            error = f"{error:.4g}" if isinstance(error, float) else ""
            rows.append([task, str(documents), name, f"{value:.4g}", error])
    return markdown_table("| task | documents | metric | value | standard error |", rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run tasks on one model, print the table and, with --out, write everything as JSON."""
    parser = argparse.ArgumentParser(prog="python -m eval.downstream", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="A run, a checkpoint, an export, a hub id.")
    add("--tasks", required=True, nargs="+", metavar="TASK", help="xlstm_paper, standard, local, ...")
    add("--include", type=Path, metavar="FOLDER", help="More task files, in lm_eval's format.")
    add("--num-fewshot", type=int, metavar="N", help="Examples before a question. Default: the task's.")
    add("--limit", type=positive, metavar="N", help="At most so many documents of each task.")
    add(
        "--context-length",
        type=positive,
        metavar="T",
        help="See windows of so many tokens. Default: everything, or the trained context of a model without state.",
    )
    add("--out", type=results_file, metavar="FILE", help="Write results, settings and samples as JSON.")
    add_model_flags(parser)
    options = parser.parse_args(arguments)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with program("eval.downstream"):
        _check(options)
        console.stage("looking up the tasks")
        manager = find_tasks(options.tasks, options.include)
        console.stage(f"loading {options.model}")
        model = load_named_model(options.model, options)
        console.stage(f"reading the data of {', '.join(options.tasks)}")
        window = options.context_length or (None if model.carries_state else model.trained_context)
        results = evaluate(
            model,
            options.tasks,
            batch_size=options.batch_size,
            window=window,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            manager=manager,
        )
        how = "state carried, no limit of context" if window is None else f"windows of {window} tokens"
        print(f"{options.model}: {model.num_parameters:,} parameters, {how}\n")
        print(as_markdown(results))
        if options.out:
            settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
            written = {
                "model": options.model,
                "parameters": model.num_parameters,
                "context_length": window,
                "settings": settings,
                "environment": environment(model.device, ("lm_eval", "transformers")),
                **{key: results[key] for key in KEPT if key in results},
            }
            write_results(options.out, written, default=str)
            print(f"Wrote {options.out}")


def _check(options: argparse.Namespace) -> None:
    if options.include and not options.include.is_dir():
        raise ValueError(f"--include {options.include} is not a folder.")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise ValueError(f"--num-fewshot {options.num_fewshot} must be at least 0.")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
