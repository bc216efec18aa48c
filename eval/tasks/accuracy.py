"""The share of right answers of a trained model, case by case."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from eval.tasks.rows import TEST
from eval.tasks.task import Case, Task, scaled_accuracy
from xlstm_lm.data import IGNORED_TARGET
from xlstm_lm.models.language_model import LanguageModel

BATCH_TOKENS = 16384


@torch.inference_mode()
def answer_cases(model: LanguageModel, task: Task, cases: list[Case], sequences: int) -> list[dict[str, Any]]:
    """Accuracy, plain and scaled, over `sequences` sequences of each case, the same ones for every model.

    An answer is right where it is the model's most probable token of the whole vocabulary.
    """
    return [_answer_case(model, task, case, sequences) for case in cases]


def _answer_case(model: LanguageModel, task: Task, case: Case, sequences: int) -> dict[str, Any]:
    generator = np.random.default_rng((TEST, *case))
    right = answers = 0
    rows = max(1, BATCH_TOKENS // case[0])
    for first in range(0, sequences, rows):
        examples = [task.example(case, generator) for _ in range(min(rows, sequences - first))]
        tokens_BT, targets_BT = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*examples, strict=True))
        asked_BT = targets_BT != IGNORED_TARGET
        logits_NV = model.logits(model(tokens_BT)[asked_BT])
        right += int((logits_NV.argmax(-1) == targets_BT[asked_BT]).sum())
        answers += int(asked_BT.sum())
    accuracy = right / answers
    return {
        "case": list(case),
        "answers": answers,
        "accuracy": accuracy,
        "scaled": scaled_accuracy(accuracy, task.chance),
    }
