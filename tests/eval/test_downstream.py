"""Downstream tasks: against lm_eval's own backend, whatever the batch, with the state carried; what mistakes say."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from eval import downstream
from eval.downstream import TASK_GROUPS, evaluate, find_tasks
from eval.scoring.harness import HarnessModel
from eval.scoring.models import load_model
from tests.eval.small_models import TEXT, save_own
from xlstm_lm import hub

LOCAL = ["local_last_word", "local_choice", "local_text", "local_repeat"]


def figures(results) -> dict[str, float]:
    """Every metric of every task but the standard errors."""
    return {
        f"{task}: {name}": value
        for task, metrics in results["results"].items()
        for name, value in metrics.items()
        if isinstance(value, float) and "stderr" not in name
    }


def per_document(results) -> dict[str, list]:
    """The model's answer to each request of each task."""
    return {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}


@pytest.mark.parametrize(
    ("kind", "tasks", "limit"), [("llama", LOCAL, 3), ("xlstm", LOCAL[:3], 2)], ids=["llama", "xlstm"]
)
def test_scores_are_those_of_lm_evals_own_backend(stock_folder, kind, tasks, limit):
    """In windows, as it makes them; our own modules compute the xlstm folder. It pads stock recurrent models wrongly on
    the left, so generation is compared where it can be."""
    folder = str(stock_folder(kind))
    theirs = HFLM(pretrained=folder, device="cpu", batch_size=3, max_length=48, dtype="float32")
    expected = simple_evaluate(theirs, tasks=tasks, task_manager=find_tasks(tasks), limit=limit, bootstrap_iters=0)
    found = evaluate(load_model(folder), tasks, batch_size=4, window=48, limit=limit, bootstrap_rounds=0)
    assert figures(found) == pytest.approx(figures(expected), rel=1e-5)
    assert len(figures(found)) == {3: 7, 4: 8}[len(tasks)]


def test_an_export_for_transformers_scores_the_same_in_lm_evals_own_backend(tmp_path):
    """Contexts begin with the end of a document in both. Whole documents are left out: that backend has the tokenizer's
    beginning of a text follow one of its own, and scores it too."""
    folder = str(save_own(tmp_path, "transformers", embedding_dim=128, pattern="mlstm"))
    theirs = HFLM(pretrained=folder, device="cpu", batch_size=3, max_length=256, dtype="float32")
    expected = simple_evaluate(theirs, tasks=LOCAL[:2], task_manager=find_tasks(LOCAL), limit=2, bootstrap_iters=0)
    found = evaluate(load_model(folder), LOCAL[:2], batch_size=4, limit=2, bootstrap_rounds=0)
    for task, answers in per_document(found).items():
        for answer, other in zip(answers, per_document(expected)[task], strict=True):
            np.testing.assert_allclose(np.array(answer, dtype=float), np.array(other, dtype=float), rtol=1e-5)


def test_long_documents_are_scored_with_all_their_context(stock_folder):
    """A carried state gives what lm_eval's backend gives in one window as long as the document."""
    folder = str(stock_folder("xlstm"))
    theirs = HFLM(pretrained=folder, device="cpu", batch_size=1, max_length=10_000, dtype="float32")
    ours = HarnessModel(load_model(folder), batch_size=2)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (TEXT[:900], "", "short", TEXT[:300])]
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, rel=1e-6)
    reset = HarnessModel(load_model(folder), batch_size=2, window=32).loglikelihood_rolling(requests, disable_tqdm=True)
    assert abs(reset[0] - expected[0]) > 1e-3


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_the_batch_size_changes_nothing(own_folder, stock_folder, kind):
    model = load_model(str(own_folder if kind == "own" else stock_folder(kind)), dtype="float64")
    window = None if model.carries_state else 64
    runs = [evaluate(model, LOCAL, batch_size=size, window=window, limit=2, bootstrap_rounds=0) for size in (1, 4, 7)]
    for run in runs[1:]:
        assert figures(run) == pytest.approx(figures(runs[0]), rel=1e-12, abs=0)
        for task, answers in per_document(run).items():
            for answer, first in zip(answers, per_document(runs[0])[task], strict=True):
                if task == "local_repeat":
                    assert answer == first
                else:
                    np.testing.assert_allclose(np.array(answer, dtype=float), np.array(first, dtype=float), rtol=1e-12)


def generation(prompt: str, **arguments) -> Instance:
    return Instance("generate_until", {}, (prompt, {"until": ["\n"], "max_gen_toks": 12} | arguments), 0)


PROMPTS = ["a", "The quick brown fox", "x y z", "The dog sleeps on the lazy dog and jumps", "12"]


@pytest.mark.parametrize(
    ("kind", "library"), [("own", "auto"), ("own", "transformers"), ("llama", "auto"), ("gpt2", "auto")]
)
def test_generation_in_batches_equals_one_prompt_at_a_time(own_folder, stock_folder, kind, library):
    folder = own_folder if kind == "own" else stock_folder(kind)
    model = load_model(str(folder), library=library, dtype="float64")
    assert model.pads_left
    window = None if model.carries_state else 64
    for arguments in ({}, {"do_sample": True, "temperature": 0.9, "top_p": 0.8}):
        requests = [generation(prompt, **arguments) for prompt in PROMPTS]
        batched = HarnessModel(model, batch_size=4, window=window).generate_until(requests, disable_tqdm=True)
        alone = HarnessModel(model, batch_size=1, window=window).generate_until(requests, disable_tqdm=True)
        assert batched == alone
        assert len(set(batched)) > 2


def test_generation_continues_with_the_likeliest_token_and_stops(own_folder):
    model = HarnessModel(load_model(str(own_folder)))
    [text] = model.generate_until([generation("The dog", until=["never there"])], disable_tqdm=True)
    trained = hub.load(own_folder)
    tokens = [256, *b"The dog"]
    for _ in range(12):
        tokens.append(int(trained(torch.tensor([tokens]))[0, -1].argmax()))
    expected = trained.tokenizer.decode(tokens[8:]).split("<|endoftext|>")[0]
    assert text == expected
    assert len(text) > 3
    [cut] = model.generate_until([generation("The dog", until=[text[2:4]])], disable_tqdm=True)
    assert cut == text[: text.index(text[2:4])]


def test_every_document_of_a_model_of_ours_begins_as_in_training(own_folder):
    """With the end of the document before, in front of contexts too."""
    model = HarnessModel(load_model(str(own_folder)))
    [(found, _)] = model.loglikelihood([Instance("loglikelihood", {}, ("ab", " c"), 0)], disable_tqdm=True)
    logits = hub.load(own_folder)(torch.tensor([[256, *b"ab c"[:-1]]]))[0].log_softmax(-1)
    assert found == pytest.approx((logits[2, ord(" ")] + logits[3, ord("c")]).item(), rel=1e-5)


def test_a_long_context_reaches_the_continuation_only_where_the_state_is_carried(own_folder):
    model = load_model(str(own_folder))
    requests = [Instance("loglikelihood", {}, (start + "x" * 40, " yes"), 0) for start in ("Q" * 30, "z" * 30)]
    carried = HarnessModel(model).loglikelihood(requests, disable_tqdm=True)
    cut = HarnessModel(model, window=16).loglikelihood(requests, disable_tqdm=True)
    assert carried[0] != carried[1]
    assert cut[0] == cut[1]


def test_the_command_prints_a_table_and_writes_json(own_folder, tmp_path, capsys):
    out = tmp_path / "new" / "result.json"
    downstream.main(["--model", str(own_folder), "--tasks", "local", "--limit", "4", "--out", str(out)])
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert set(LOCAL) <= set(written["results"])
    accuracy = written["results"]["local_choice"]["acc,none"]
    assert f"| local_choice | 4 | acc | {accuracy:.4g} |" in printed
    assert "state carried, no limit of context" in printed
    assert written["environment"]["lm_eval"]
    assert len(written["samples"]["local_text"]) == 4


def test_task_files_of_ones_own(own_folder, tmp_path):
    source = Path(downstream.LOCAL_TASKS)
    (tmp_path / "mine.yaml").write_text(
        (source / "local_choice.yaml").read_text().replace("local_choice", "mine").replace("{name: choice}", "{}")
    )
    (tmp_path / "data.py").write_text(
        "from datasets import Dataset, DatasetDict\n"
        "def load(**_):\n"
        "    return DatasetDict(test=Dataset.from_list([{'question': 'a?', 'choices': ['b', 'c'], 'answer': 1}]))\n"
    )
    tasks = ["mine", "local"]  # a task and a group
    results = evaluate(
        load_model(str(own_folder)), tasks, limit=2, manager=find_tasks(tasks, tmp_path), bootstrap_rounds=0
    )
    assert results["n-samples"]["mine"]["effective"] == 1
    assert set(LOCAL) < set(results["results"])


def test_the_groups_name_the_tasks_of_the_paper():
    groups = {path.stem: yaml.safe_load(path.read_text())["task"] for path in TASK_GROUPS.glob("*.yaml")}
    assert groups["xlstm_paper"] == ["lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande"]
    assert groups["standard"] == [*groups["xlstm_paper"], "openbookqa", "wikitext"]
    tasks = Path(find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
    lines = [line for path in tasks.glob("[lhpawo]*/*.yaml") for line in path.read_text().splitlines()]
    there = {line.removeprefix("task: ") for line in lines if line.startswith("task: ")}
    assert set(groups["standard"]) <= there


@pytest.mark.slow  # lm_eval's index of 14,000 tasks takes 15 s
def test_a_task_that_there_is_not(own_folder, capsys):
    assert {"xlstm_paper", "standard", "hellaswag"} <= set(find_tasks(["xlstm_paper", "piqa"]).all_tasks)
    with pytest.raises(SystemExit) as stopped:
        downstream.main(["--model", str(own_folder), "--tasks", "local_txt", "qqqqqqqq"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "unknown tasks: local_txt (did you mean local_text" in error
    assert "qqqqqqqq. Here are local, local_choice" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "{nowhere}", "--tasks", "local"], "holds no model that can be loaded"),
        (["--model", "{own}", "--tasks", "local", "--num-fewshot", "-1"], "--num-fewshot -1 must be at least 0"),
        (["--model", "{own}", "--tasks", "local", "--include", "{nowhere}"], "is not a folder"),
        (["--model", "{own}", "--tasks", "local", "--out", "{folder}"], "is a folder; name a file"),
        (["--model", "{own}", "--tasks", "local", "--context-length", "1"], "it must be at least 2"),
        (["--model", "{own}", "--tasks", "local_repeat", "--context-length", "20"], "leaves no room for a prompt"),
        (["--model", "{mamba}", "--tasks", "local"], "keeps no state of constant size"),
    ],
)
def test_a_mistake_ends_with_one_message_and_exit_code_2(
    flags, message, own_folder, stock_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    places = {"own": own_folder, "nowhere": tmp_path / "nowhere", "folder": tmp_path, "mamba": stock_folder("mamba")}
    with pytest.raises(SystemExit) as stopped:
        downstream.main([flag.format(**places) for flag in flags])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert "Traceback" not in error
