"""No export without proof: a fresh process loads it and must say what the trained model says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from xlstm_lm.base.finite import check_finite
from xlstm_lm.base.import_path import child_environment
from xlstm_lm.data import Tokenizer
from xlstm_lm.hub.formats.export_format import ExportFormat

TEXTS = (
    "def ",
    "The capital of France is",
    "import os\n\n\nclass Reader:\n    def __init__(self, path: str) -> None:\n",
)
LENGTHS = (1, 7, 64, 131)
BATCH = 2
NEW_TOKENS = 16
TOLERANCE = 1e-3
"""How far a logit may be off, of the largest: float32 in another order of operations, through many blocks."""


@torch.inference_mode()
def ask(model: nn.Module, tokenizer: Tokenizer, export_format: ExportFormat, question: Path) -> None:
    """Write into a new folder what the trained model says: logits at several lengths, and greedy texts.

    Raises:
        ValueError: its logits are not finite.
    """
    question.mkdir()
    end, vocab_size = tokenizer.end_of_document, tokenizer.vocab_size
    stream = [token for text in TEXTS for token in [end, *tokenizer.encode(text)]]
    stream = torch.tensor(stream * (1 + BATCH * max(LENGTHS) // len(stream)))
    answers: dict[str, Tensor] = {}
    for length in LENGTHS:
        tokens_BT = stream[: BATCH * length].view(BATCH, length)
        answers |= {f"length{length}.tokens": tokens_BT.clone(), f"length{length}": _logits(model, tokens_BT)}
    texts = []
    for number, text in enumerate(TEXTS):
        ids = [end, *tokenizer.encode(text)]
        answers[f"text{number}.logits"] = _logits(model, torch.tensor([ids]))[0]
        greedy, margins = _greedy(model, ids, end, vocab_size)
        texts.append({"name": f"text{number}", "text": text, "ids": ids, "greedy": greedy, "margins": margins})
    save_file(answers, question / "answers.safetensors")
    asked = {
        "texts": texts,
        "logits": [f"length{length}" for length in LENGTHS],
        "new_tokens": NEW_TOKENS,
        "padded_rows": list(range(vocab_size, model.config.vocab_size)),
        "tolerance": TOLERANCE,
        "leaves_out_padding": export_format.leaves_out_padding,
        "remote_code": export_format.write_code is not None,
    }
    (question / "question.json").write_text(json.dumps(asked), encoding="utf-8")


def check(folder: Path, question: Path) -> dict[str, Any]:
    """Have a fresh process compare the export in `folder`. Returns what it found: the largest `difference`.

    Raises:
        ValueError: it could not be loaded, or differs; says in what.
    """
    script = Path(__file__).with_name("fresh_check.py")
    command = [sys.executable, "-P", str(script), str(folder.resolve()), str(question)]
    finished = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**child_environment(), "PYTHONWARNINGS": "ignore", "PYTHONIOENCODING": "utf-8"},
    )
    lines = finished.stdout.strip().splitlines()
    if finished.returncode or not lines:
        raise ValueError(
            "The export was not finished: a fresh process could not use what was written.\n" + finished.stderr.strip()
        )
    found = json.loads(lines[-1])
    if found["problems"]:
        raise ValueError(
            "The export was not finished: in a fresh process it differs from the trained model.\n  "
            + "\n  ".join(found["problems"])
        )
    return found


def _logits(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    logits_BTV = model.logits(model(tokens_BT)).float().contiguous()
    check_finite(logits_BTV, model, "The export was not finished: the model's logits")
    return logits_BTV


def _greedy(model: nn.Module, ids: list[int], end: int, vocab_size: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens, one after the other up to an end of document, and how much likelier each was than the
    next best, in logits."""
    tokens, margins = [], []
    hidden_BTD, state = model(torch.tensor([ids]), return_state=True)
    while len(tokens) < NEW_TOKENS and end not in tokens:
        best_2 = model.logits(hidden_BTD[:, -1:])[0, -1, :vocab_size].topk(2)
        tokens.append(int(best_2.indices[0]))
        margins.append(float(best_2.values[0] - best_2.values[1]))
        hidden_BTD, state = model(torch.tensor([tokens[-1:]]), state=state, return_state=True)
    return tokens, margins
